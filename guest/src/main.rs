//! The guest kernel: the `guest` library on real hardware. Built by `guest/image/build.rs`.

#![no_std]
#![no_main]

mod apic;
mod arch;
mod console;
mod cpus;
mod exit;
mod kernel;
mod machine;

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    kernel::panicked(info)
}
