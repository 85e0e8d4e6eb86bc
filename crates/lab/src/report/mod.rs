//! Results that people and CI read: one self-contained HTML page, JUnit XML, TAP.
//!
//! **What it is.** Typed data in, text out. A page is made of sections, a section of paragraphs, tables, charts and heat
//! maps ([`Page`], [`Section`]); what a sweep found and what a trace holds become sections of their own ([`sweep`],
//! [`timeline`]). Test results are [`cases`], written as JUnit or TAP.
//!
//! **What it is not.** It judges nothing: verdicts come from elsewhere. It opens no file but the trace that it is given,
//! and knows no command line.
//!
//! **How.** Text and tables are HTML, made here. Charts and heat maps go into the page as JSON, next to where they are
//! to be, and a script in the page draws them, with uPlot: `vendor/uplot`. The page loads nothing, and a content security
//! policy sees to it. The same data gives the same bytes.

pub mod cases;
pub mod chart;
mod embed;
mod heat;
mod page;
pub mod study;
pub mod sweep;
pub mod table;
pub mod timeline;
pub mod units;

pub use chart::Chart;
pub use heat::Heat;
pub use page::{Found, Page, Section};
pub use table::{Cell, Table, Tone};
