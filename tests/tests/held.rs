//! What nobody reads holds nobody: not a guest's end, not a client's answer, not a signal.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::UnixStream,
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
use vm_tests::{Ended, Lab, finish, guest, kvm, raw};

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

/// That a VM which writes to something that nobody reads ends however it is asked to.
fn ends_all_the_same(lab: &Lab, more: &str, output: impl Fn(&mut Command) -> Option<std::io::PipeReader>) {
    for how in ENDS {
        let mut vmm = idle(lab, how, more);
        let unread = output(&mut vmm);
        let mut child = vmm.spawn().unwrap();
        drop(vmm);
        if how != End::Timeout {
            // It answers although nobody reads it.
            until(|| status(lab).is_some());
        }
        let code = end(lab, &mut child, how);
        // A trace that nobody read is not whole, unless all of it is in the pipe.
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
    if !kvm() {
        return;
    }
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
    if !kvm() {
        return;
    }
    ends_all_the_same(&Lab::new(), "", |vmm| {
        let (unread, full) = full_pipe();
        vmm.stdout(Stdio::null()).stderr(full);
        Some(unread)
    });
}

// Catches: a trace that is written on a vCPU's thread into a pipe without a reader, and one that lacks a part without a word.
#[test]
fn a_trace_that_nobody_reads_holds_nobody() {
    if !kvm() {
        return;
    }
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
    if !kvm() {
        return;
    }
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
    if !kvm() {
        return;
    }
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

// Catches: a line of the log for each of a thousand clients, and a server that ends with them.
#[test]
fn a_thousand_clients_are_a_few_lines() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let mut child = idle(&lab, End::Quit, "").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    until(|| status(&lab).is_some());
    let clients: Vec<_> = (0..1000).filter_map(|_| UnixStream::connect(lab.path("s")).ok()).collect();
    assert_eq!(clients.len(), 1000);
    assert_eq!(end(&lab, &mut child, End::Quit), 0);
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let lines = said.lines().filter(|line| line.contains("the oldest that waits for no answer is cut off")).count();
    assert!((1..=20).contains(&lines), "{lines} lines: {said}");
    assert!(said.contains("lines of the log like those above were left out"), "{said}");
}

// Catches: a socket that is dead for good once there was no descriptor for a client.
#[test]
fn a_socket_comes_back_when_descriptors_do() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    // As few as it takes, and some.
    let vmm = format!(
        "ulimit -n 40; exec {} --guest {} --cmdline scenario=idle --api-sock s",
        vm_tests::vmm().display(),
        guest().display()
    );
    let mut shell = Command::new("sh");
    shell
        .current_dir(lab.path("."))
        .args(["-c", &vmm])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = shell.spawn().unwrap();
    until(|| status(&lab).is_some());
    let clients: Vec<_> = (0..60).filter_map(|_| UnixStream::connect(lab.path("s")).ok()).collect();
    // So long that it has met the limit.
    thread::sleep(Duration::from_millis(300));
    drop(clients);
    until(|| status(&lab).is_some());
    assert_eq!(end(&lab, &mut child, End::Quit), 0);
}

/// A guest that changes every page of 512 MiB and halts, with interrupts on and the 8259's masked.
fn touches() -> Vec<u8> {
    // MOV EDI, 0x1000000; MOV ECX, 131072; MOV [EDI], EDI; ADD EDI, 4096; LOOP; MOV AL, 0xff; OUT 0x21; MOV DX, 0x3f8; MOV AL,
    // '!'; OUT; STI; HLT; JMP
    let code = [
        0xbf, 0, 0, 0, 0x01, 0xb9, 0, 0, 0x02, 0, 0x89, 0x3f, 0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xf6, 0xb0, 0xff, 0xe6,
        0x21, 0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xfb, 0xf4, 0xeb, 0xfc,
    ];
    raw::multiboot(&code)
}

/// Nothing that is not a whole snapshot is left in the directory `dir` of `lab`.
fn nothing_half_written(lab: &Lab, dir: &str) {
    let names: Vec<String> =
        fs::read_dir(lab.path(dir)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| name == "snap"), "{names:?}");
    if !names.is_empty() {
        lab.run(&format!("snapshot show {dir}/snap")).expect(0);
    }
}

// Catches: a save that keeps status, signals and the timeout waiting, and one that leaves half of itself behind.
#[test]
fn a_save_can_be_watched_and_given_up() {
    if !kvm() {
        return;
    }
    for how in [End::Quit, End::Terminate, End::Interrupt] {
        let lab = Lab::new();
        fs::write(lab.path("touches"), touches()).unwrap();
        fs::create_dir(lab.path("dir")).unwrap();
        let (mut console, output) = std::io::pipe().unwrap();
        let mut vmm = lab.vmm("--guest touches --memory 600M --api-sock s");
        let mut child = vmm.stdin(Stdio::null()).stdout(output).stderr(Stdio::null()).spawn().unwrap();
        drop(vmm);
        console.read_exact(&mut [0]).unwrap();
        let path = lab.path("dir/snap").display().to_string();
        let client = lab.vmm(&format!("ctl --api-sock s snapshot {path}")).stderr(Stdio::piped()).spawn().unwrap();
        // It answers while it saves. A fast disk may be done before the look.
        let mut seen = false;
        until(|| {
            let saving = status(&lab).unwrap()["saving"].clone();
            seen |= saving["total_bytes"].as_u64().is_some_and(|bytes| bytes > 512 << 20);
            seen || lab.path("dir/snap").exists()
        });
        assert_eq!(end(&lab, &mut child, how), 0, "{how:?}");
        drop(client.wait_with_output().unwrap());
        nothing_half_written(&lab, "dir");
        if !seen {
            eprintln!("the save was done before it could be watched");
        }
    }
}

// Catches: a save beside the loop that does not leave what one that is waited for leaves, or a VM that does not go on.
#[test]
fn a_vm_goes_on_while_its_snapshot_reaches_the_disk() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let mut child =
        idle(&lab, End::Quit, "--track-dirty").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    until(|| status(&lab).is_some_and(|status| status["ticks"].as_u64() > Some(5)));
    let save = |name: &str, more: &str| -> Ended {
        lab.run(&format!("ctl --api-sock s snapshot {} {more}", lab.path(name).display()))
    };
    save("full", "").expect(0);
    let ticks = status(&lab).unwrap()["ticks"].as_u64();
    until(|| status(&lab).unwrap()["ticks"].as_u64() > ticks);
    let base = lab.path("full").display().to_string();
    save("more", &format!("--base {base}")).expect(0);
    // What changed after the first was saved is in the second.
    assert_eq!(end(&lab, &mut child, End::Quit), 0);
    for name in ["full", "more"] {
        let mut restored = lab
            .vmm(&format!("restore {name} --api-sock s"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until(|| status(&lab).is_some_and(|status| status["ticks"].as_u64() > ticks));
        assert_eq!(end(&lab, &mut restored, End::Quit), 0, "{name}");
    }
}

// Catches: commands that wait for a save and then for each other, for ever; a pause that the end of a save undoes.
#[test]
fn commands_wait_for_a_save_in_order() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    fs::write(lab.path("touches"), touches()).unwrap();
    let (mut console, output) = std::io::pipe().unwrap();
    let mut vmm = lab.vmm("--guest touches --memory 600M --api-sock s");
    let mut child = vmm.stdin(Stdio::null()).stdout(output).stderr(Stdio::null()).spawn().unwrap();
    drop(vmm);
    console.read_exact(&mut [0]).unwrap();
    let ctl = |command: &str| lab.vmm(&format!("ctl --api-sock s {command}")).spawn().unwrap();
    let clients =
        ["snapshot one", "snapshot two", "pause", "snapshot three", "pause"].map(|command| (command, ctl(command)));
    for (command, mut client) in clients {
        assert!(client.wait().unwrap().success(), "{command}");
    }
    let status = status(&lab).unwrap();
    assert_eq!((&status["state"], &status["saving"]), (&"paused".into(), &Value::Null));
    assert_eq!(end(&lab, &mut child, End::Quit), 0);
}

// Catches: clients that got their answer and stay, and keep all others out.
#[test]
fn clients_that_stay_keep_nobody_out() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let mut child = idle(&lab, End::Quit, "").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until(|| status(&lab).is_some());
    let stay: Vec<_> = (0..40)
        .map(|_| {
            let mut client = UnixStream::connect(lab.path("s")).unwrap();
            client.write_all(b"GET /v1/status HTTP/1.1\r\n\r\n").unwrap();
            client.read_exact(&mut [0; 12]).unwrap();
            client
        })
        .collect();
    assert!(status(&lab).is_some());
    assert_eq!(end(&lab, &mut child, End::Quit), 0);
    drop(stay);
}

// Catches: a handler of SIGBUS that waits until somebody reads its last word.
#[test]
fn lost_memory_ends_a_vm_that_nobody_hears() {
    if !kvm() {
        return;
    }
    // A resume writes the kvmclock page: the VMM itself touches what is lost. A snapshot reads everything.
    for (flags, command) in [("--verify now --paused", "resume"), ("", "snapshot second")] {
        let lab = Lab::new();
        lab.boot("scenario=idle hz=100 touch=600", "--save-at 300ms --save-to snapshot");
        let (unread, full) = full_pipe();
        let mut vmm = lab.vmm(&format!("restore snapshot --api-sock s {flags}"));
        let mut child = vmm.stdin(Stdio::null()).stdout(Stdio::null()).stderr(full).spawn().unwrap();
        drop(vmm);
        until(|| lab.path("s").exists());
        File::options().write(true).open(lab.path("snapshot/memory")).unwrap().set_len(0).unwrap();
        let mut client = lab.vmm(&format!("ctl --api-sock s {command}")).stderr(Stdio::null()).spawn().unwrap();
        let mut code = None;
        until(|| {
            code = child.try_wait().unwrap();
            code.is_some()
        });
        assert_eq!(code.and_then(|code| code.code()), Some(2), "{flags}");
        client.wait().unwrap();
        drop(unread);
    }
}
