//! An output without a reader does not block the VMM: neither the guest's end, nor the answer to a client, nor a
//! signal. Neither does a client that stays connected ([`clients`]), or a slow disk ([`saves`]).

mod clients;
mod saves;

use std::{
    fs::{self, File},
    io::{Read, Write},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use serde_json::Value;
use vm_tests::{Lab, finish, raw, require_kvm};

/// Far more looks than anything here needs, and what is between two of them.
const LOOKS: u32 = 30_000;
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// A pipe that takes no byte more: what reads it, and what writes to it.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (unread, mut full) = std::io::pipe().unwrap();
    let flags = OFlag::from_bits_retain(fcntl(&full, FcntlArg::F_GETFL).unwrap());
    fcntl(&full, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).unwrap();
    while full.write(&[0; 4096]).is_ok() {}
    while full.write(&[0]).is_ok() {}
    fcntl(&full, FcntlArg::F_SETFL(flags)).unwrap();
    (unread, full)
}

/// How a VM is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Timeout,
    Terminate,
    Interrupt,
    Quit,
}

const ENDS: [End; 4] = [End::Timeout, End::Terminate, End::Interrupt, End::Quit];

fn until(mut condition: impl FnMut() -> bool) {
    for _ in 0..LOOKS {
        if condition() {
            return;
        }
        thread::sleep(LOOK_AGAIN);
    }
    panic!("it did not come");
}

fn status(lab: &Lab) -> Option<Value> {
    let status = lab.run("ctl --api-sock s status");
    (status.code() == 0).then(|| serde_json::from_str(&status.stdout).unwrap())
}

/// Asks the VM of `lab`, whose process this is, to end, and waits until it has.
fn end(lab: &Lab, child: &mut Child, how: End) -> i32 {
    let process = Pid::from_raw(i32::try_from(child.id()).unwrap());
    match how {
        End::Timeout => {}
        End::Terminate => kill(process, Signal::SIGTERM).unwrap(),
        End::Interrupt => kill(process, Signal::SIGINT).unwrap(),
        End::Quit => drop(lab.run("ctl --api-sock s quit").expect(0)),
    }
    for _ in 0..LOOKS {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or_else(|| panic!("{how:?}: {status}"));
        }
        thread::sleep(LOOK_AGAIN);
    }
    child.kill().unwrap();
    panic!("{how:?}: it did not end");
}

/// A guest that idles, with a control socket `s`; its output is still to be said.
fn idle(lab: &Lab, how: End, more: &str) -> Command {
    let timeout = if how == End::Timeout { "--timeout 1s" } else { "" };
    let mut vmm = lab.guest("scenario=idle hz=100", &format!("--api-sock s {timeout} {more}"));
    vmm.stdin(Stdio::null());
    vmm
}

/// Checks that a VM whose output has no reader ends on each kind of request.
fn ends_all_the_same(lab: &Lab, more: &str, output: impl Fn(&mut Command) -> Option<std::io::PipeReader>) {
    for how in ENDS {
        let mut vmm = idle(lab, how, more);
        let unread = output(&mut vmm);
        let mut child = vmm.spawn().unwrap();
        drop(vmm);
        if how != End::Timeout {
            // It answers although its output has no reader.
            until(|| status(lab).is_some());
        }
        let code = end(lab, &mut child, how);
        // A trace without a reader is not complete, unless all of it is in the pipe.
        let wanted = i32::from(how == End::Timeout);
        assert!(code == wanted || code == 2 && more.contains("trace"), "{how:?} {more}: {code}");
        if let Some(mut stderr) = child.stderr.take() {
            let mut said = String::new();
            stderr.read_to_string(&mut said).unwrap();
            assert!(!said.contains("did not stop within"), "{how:?} {more}: {said}");
        }
        drop(unread);
    }
}

// Catches: a guest's output that is written on a vCPU's thread, which then hears nothing.
#[test]
fn a_console_that_nobody_reads_holds_nobody() {
    require_kvm!();
    for more in ["", "--time virtual", "--cpus 2", "--lapic kvm", "--console-full drop"] {
        ends_all_the_same(&Lab::new(), more, |vmm| {
            let (unread, full) = full_pipe();
            vmm.stdout(full).stderr(Stdio::piped());
            Some(unread)
        });
    }
}

// Catches: a message or a line of the log that waits for its reader.
#[test]
fn messages_that_nobody_reads_hold_nobody() {
    require_kvm!();
    ends_all_the_same(&Lab::new(), "", |vmm| {
        let (unread, full) = full_pipe();
        vmm.stdout(Stdio::null()).stderr(full);
        Some(unread)
    });
}

// Catches: a trace that is written on a vCPU's thread into a pipe without a reader, and one that lacks a part without a
// word.
#[test]
fn a_trace_that_nobody_reads_holds_nobody() {
    require_kvm!();
    let lab = Lab::new();
    mkfifo(&lab.path("fifo"), Mode::S_IRWXU).unwrap();
    for more in ["--trace fifo", "--trace fifo --time virtual"] {
        ends_all_the_same(&lab, more, |vmm| {
            vmm.stdout(Stdio::null()).stderr(Stdio::piped());
            None
        });
    }
}

// Catches: bytes that are lost or change their order when a reader is slow, and a trace that differs for that.
#[test]
fn a_slow_reader_gets_everything() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--time virtual --tsc-khz 2600000";
    let whole = lab.boot_traced("hz=100 count=12000", flags).trace.unwrap().bytes;
    assert!(whole.len() > 2 << 20, "more than is kept");
    mkfifo(&lab.path("fifo"), Mode::S_IRWXU).unwrap();
    let path = lab.path("fifo");
    let reader = thread::spawn(move || {
        let (mut fifo, mut bytes) = (File::open(path).unwrap(), Vec::new());
        // Let it fill first.
        thread::sleep(Duration::from_millis(300));
        fifo.read_to_end(&mut bytes).unwrap();
        bytes
    });
    finish(lab.guest("hz=100 count=12000", flags).args(["--trace", "fifo"])).expect(0);
    assert!(reader.join().unwrap() == whole);
}

/// A guest that prints `bytes` bytes, and succeeds.
fn prints(bytes: u32) -> Vec<u8> {
    // MOV ESI, 0x100000; MOV ECX, 4096; MOV DX, 0x3f8; CLD; REP OUTSB; DEC EBX; JNZ. EBX = times.
    let once = [0xbe, 0, 0, 0x10, 0, 0xb9, 0, 0x10, 0, 0, 0x66, 0xba, 0xf8, 0x03, 0xfc, 0xf3, 0x6e, 0x4b, 0x75, 0xec];
    let times = [&[0xbb][..], &(bytes / 4096).to_le_bytes()].concat();
    raw::multiboot(&[&times[..], &once, &raw::SUCCESS].concat())
}

// Catches: `wait` that loses bytes, `drop` that waits, and a loss that is not told.
#[test]
fn a_full_console_waits_or_drops_as_asked() {
    require_kvm!();
    let lab = Lab::new();
    // More than is kept and a pipe holds.
    const BYTES: u32 = (1 << 20) + (128 << 10);
    fs::write(lab.path("prints"), prints(BYTES)).unwrap();
    let vmm = lab.vmm("--guest prints").output().unwrap();
    assert_eq!((vmm.status.code(), vmm.stdout.len()), (Some(0), BYTES as usize));
    let (unread, full) = full_pipe();
    let vmm = lab.vmm("--guest prints --console-full drop").stdout(full).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&vmm.stderr);
    assert_eq!(vmm.status.code(), Some(0), "{said}");
    assert!(said.contains(" bytes of the console's output were dropped"), "{said}");
    drop(unread);
}
