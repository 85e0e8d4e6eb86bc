//! A saved VM: a file of registers, and one of RAM with holes where it is zero.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use anyhow::{Context, Result};

use super::machine::{FloorVm, Saved, bytes_of, from_bytes};

const REGISTERS: &str = "registers";
const RAM: &str = "ram";
const PAGE: usize = 4096;

/// Saves `machine` into the directory `dir`.
pub fn save(machine: &mut FloorVm, dir: &Path) -> Result<()> {
    let name = || format!("saving into {}", dir.display());
    fs::create_dir_all(dir).with_context(name)?;
    let Saved { regs, sregs, cpuid } = machine.registers()?;
    let registers = [bytes_of(&[regs]), bytes_of(&[sregs]), bytes_of(&cpuid)].concat();
    fs::write(dir.join(REGISTERS), registers).with_context(name)?;
    let file = File::create(dir.join(RAM)).with_context(name)?;
    let ram = machine.ram();
    file.set_len(ram.len() as u64).with_context(name)?;
    for (number, page) in ram.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0)) {
        file.write_all_at(page, (number * PAGE) as u64).with_context(name)?;
    }
    Ok(())
}

/// Restores the VM saved in `dir`, which had `bytes` of RAM. RAM is read when the guest touches it, not before.
pub fn restore(dir: &Path, bytes: usize) -> Result<FloorVm> {
    let name = || format!("restoring {}", dir.display());
    let registers = fs::read(dir.join(REGISTERS)).with_context(name)?;
    let saved = parse(&registers).with_context(name)?;
    let ram = File::open(dir.join(RAM)).with_context(name)?;
    FloorVm::restored(&saved, &ram, bytes).with_context(name)
}

fn parse(registers: &[u8]) -> Option<Saved> {
    let (regs, rest) = registers.split_at_checked(size_of_val(&kvm_bindings::kvm_regs::default()))?;
    let (sregs, cpuid) = rest.split_at_checked(size_of_val(&kvm_bindings::kvm_sregs::default()))?;
    Some(Saved { regs: *from_bytes(regs).first()?, sregs: *from_bytes(sregs).first()?, cpuid: from_bytes(cpuid) })
}
