//! Guest RAM, and sets of its pages.

pub mod pages;
pub mod ram;
