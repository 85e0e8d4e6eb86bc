//! Clients of the control socket that are many, or that stay.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use vm_tests::{Lab, guest, require_kvm};

use crate::{End, end, idle, status, until};

// Catches: a line of the log for each of a thousand clients, and a server that ends with them.
#[test]
fn a_thousand_clients_are_a_few_lines() {
    require_kvm!();
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
    require_kvm!();
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

// Catches: clients that got their answer and stay, and keep all others out.
#[test]
fn clients_that_stay_keep_nobody_out() {
    require_kvm!();
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
