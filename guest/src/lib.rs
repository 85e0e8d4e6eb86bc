//! The guest kernel's pure parts, tested on the host.

#![no_std]
