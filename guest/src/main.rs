//! The guest kernel.

#![no_std]
#![no_main]
