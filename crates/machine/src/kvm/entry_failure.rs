//! Why a CPU does not enter a guest: KVM_EXIT_FAIL_ENTRY's `hardware_entry_failure_reason` in words.
//!
//! KVM passes on the hardware's number; those of VMX and SVM do not overlap. VMX has a VM-instruction error (SDM vol.
//! 3, "VM-Instruction Error Numbers") if VMLAUNCH or VMRESUME fails at once, and an exit reason with bit 31 set ("VMX
//! Basic Exit Reasons") if it fails while it loads the guest's state. SVM has one exit code (APM vol. 2, "SVM Intercept
//! Exit Codes"), which older kernels report without its upper half.

/// The meaning of `reason`, if it is one that a vCPU's state can cause.
#[must_use]
pub fn entry_failure(reason: u64) -> Option<&'static str> {
    Some(match reason {
        4 => "VMLAUNCH with a VMCS that is not clear",
        5 => "VMRESUME with a VMCS that was not launched",
        7 => "VM entry with invalid control fields",
        8 => "VM entry with invalid host-state fields",
        26 => "VM entry with events blocked by MOV SS",
        0x8000_0021 => "VM entry with invalid guest state",
        0x8000_0022 => "VM entry failed to load an MSR",
        0x8000_0029 => "a machine check during VM entry",
        0xffff_ffff | u64::MAX => "VMRUN with invalid guest state or controls (VMEXIT_INVALID)",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::entry_failure;

    // 7 was reported as an invalid guest state; it means that control fields are wrong, which KVM or the VMM has set.
    #[test]
    fn control_fields_and_guest_state_have_different_words() {
        assert_eq!(entry_failure(7), Some("VM entry with invalid control fields"));
        assert_eq!(entry_failure(8), Some("VM entry with invalid host-state fields"));
        assert_eq!(entry_failure(0x8000_0021), Some("VM entry with invalid guest state"));
        assert_eq!(entry_failure(0x8000_0022), Some("VM entry failed to load an MSR"));
    }

    #[test]
    fn svm_has_one_reason_in_two_widths() {
        assert!(entry_failure(u64::MAX).is_some_and(|words| words.contains("VMEXIT_INVALID")));
        assert_eq!(entry_failure(u64::from(u32::MAX)), entry_failure(u64::MAX));
    }

    #[test]
    fn unknown_numbers_have_no_words() {
        for reason in [0, 1, 33, 34, 0x21, 0x8000_0000, 0x8000_0007, 0xffff_fffe, 1 << 32] {
            assert_eq!(entry_failure(reason), None, "{reason:#x}");
        }
    }
}
