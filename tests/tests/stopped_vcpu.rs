//! Messages to a CPU that the host does not run.

use std::{
    fs,
    io::Read,
    os::fd::AsFd,
    process::{Child, ChildStdout, Stdio},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        ptrace,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use vm_tests::{
    Lab,
    kernel::{self, Kernel, count, store, times, until, word},
    require_kvm, skip,
};

const VECTOR: u8 = 0x40;
const OTHER: u8 = 0x41;

fn readable(output: &ChildStdout, within: PollTimeout) -> bool {
    poll(&mut [PollFd::new(output.as_fd(), PollFlags::POLLIN)], within).unwrap() > 0
}

/// Whether the guest prints `wanted` within this time.
fn prints(from: &mut ChildStdout, wanted: u8, within: Duration) -> bool {
    let begun = Instant::now();
    let mut byte = [0];
    while byte != [wanted] {
        let left = PollTimeout::try_from(within.saturating_sub(begun.elapsed())).unwrap();
        if !readable(from, left) || from.read(&mut byte).unwrap() == 0 {
            return false;
        }
    }
    true
}

fn end(process: &mut Child) {
    process.kill().and_then(|()| process.wait()).unwrap();
}

/// The thread of `process` that runs its second vCPU.
fn second_vcpu(process: &Child) -> Pid {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    let task = tasks.find(|task| fs::read_to_string(task.join("comm")).unwrap() == "vcpu1\n").expect("its thread");
    Pid::from_raw(task.file_name().unwrap().to_str().unwrap().parse().unwrap())
}

/// A `vmm` whose guest has printed R and whose second vCPU's thread does not run until it is let go; none if the guest
/// is past its wait already.
fn held(lab: &Lab) -> nix::Result<Option<(Child, ChildStdout, Pid)>> {
    let mut command = lab.vmm("--guest image --cpus 2 --x2apic off --timeout 60s");
    let mut vmm = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = vmm.stdout.take().unwrap();
    assert!(prints(&mut output, b'R', Duration::from_secs(60)), "the guest does not begin");
    let thread = second_vcpu(&vmm);
    let held = ptrace::seize(thread, ptrace::Options::empty()).and_then(|()| {
        ptrace::interrupt(thread)?;
        waitpid(thread, Some(WaitPidFlag::__WALL))
    });
    if held.is_ok() && !readable(&output, PollTimeout::ZERO) {
        return Ok(Some((vmm, output, thread)));
    }
    end(&mut vmm);
    held.map(|_| None)
}

// Catches: a message that is lost because many wait for a CPU that the host does not run.
#[test]
fn no_message_to_a_cpu_that_does_not_run_is_lost() {
    require_kvm!();
    let lab = Lab::new();
    let send = |vector: u8| [store(kernel::ICR_HIGH, 1 << 24), store(kernel::ICR, 0x4000 | u32::from(vector))].concat();
    let kernel = Kernel::new(&[
        kernel::start_second(),
        until(word(0), 1),
        kernel::print(b'R'),
        times(100_000, &kernel::PASS),
        kernel::print(b'F'),
        times(2000, &send(VECTOR)),
        send(OTHER),
        kernel::print(b'S'),
        until(count(OTHER), 1),
        until(count(VECTOR), 1),
    ])
    .second(&[store(word(0), 1), kernel::IDLE.to_vec()])
    .counting_apic(VECTOR)
    .counting_apic(OTHER);
    fs::write(lab.path("image"), kernel.image()).unwrap();
    let mut attempts = 0;
    // The guest may be past its wait before its CPU is held, or the thread is held while it has a lock. Again, then.
    let (mut vmm, thread) = loop {
        match held(&lab) {
            Ok(Some((mut vmm, mut output, thread))) => {
                if prints(&mut output, b'S', Duration::from_secs(20)) {
                    break (vmm, thread);
                }
                end(&mut vmm);
                attempts += 1;
                assert!(attempts < 5, "no message is sent while the second CPU is held");
            }
            Ok(None) => {}
            Err(error) => skip!("ptrace cannot hold a thread here: {error}"),
        }
    };
    ptrace::detach(thread, None).unwrap();
    assert_eq!(vmm.wait().unwrap().code(), Some(0));
}
