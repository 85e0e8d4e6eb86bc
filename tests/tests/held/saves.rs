//! Snapshots that take long, and guest RAM that is lost.

use std::{
    fs::{self, File},
    io::Read,
    process::Stdio,
};

use serde_json::Value;
use vm_tests::{Ended, Lab, raw, require_kvm};

use crate::{End, end, full_pipe, idle, status, until};

/// A guest that changes every page of 512 MiB and halts, with interrupts on and the 8259's masked.
fn touches() -> Vec<u8> {
    // MOV EDI, 0x1000000; MOV ECX, 131072; MOV [EDI], EDI; ADD EDI, 4096; LOOP; MOV AL, 0xff; OUT 0x21; MOV DX, 0x3f8;
    // MOV AL, '!'; OUT; STI; HLT; JMP
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
    require_kvm!();
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
    require_kvm!();
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
    require_kvm!();
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

// Catches: a handler of SIGBUS that blocks because its last message has no reader.
#[test]
fn lost_memory_ends_a_vm_whose_output_has_no_reader() {
    require_kvm!();
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
