//! Writes results for people and CI: one self-contained HTML page, JUnit XML, TAP.
//!
//! **What it is.** Typed data in, text out. A page is made of sections, a section of paragraphs, tables, charts and
//! heat maps ([`Page`], [`Section`]). A sweep's findings and a trace become sections of their own ([`sweep`],
//! [`timeline`]). Test results are [`cases`], written as JUnit or TAP.
//!
//! **What it is not.** It computes no verdict: verdicts are part of its input. It opens no file, and does not depend on
//! the command line.
//!
//! **How.** Text and tables are HTML, made here. Charts and heat maps go into the page as JSON, each at its place, and
//! a script in the page draws them with uPlot (`vendor/uplot`). The page loads nothing; a content security policy
//! forbids it. The same data gives the same bytes.

pub mod cases;
pub mod chart;
pub mod clock;
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
