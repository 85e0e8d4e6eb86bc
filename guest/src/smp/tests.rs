//! Links between threads, and the arithmetic around them.

use core::sync::atomic::AtomicBool;
use std::string::ToString;
use std::thread;

use super::*;

#[test]
fn the_cpus_form_a_ring() {
    assert_eq!([0, 1, 2, 3].map(|cpu| next_cpu(cpu, 4)), [1, 2, 3, 0]);
    for cpus in 1..=16 {
        for cpu in 0..cpus {
            assert_eq!(previous_cpu(next_cpu(cpu, cpus), cpus), cpu);
        }
    }
}

#[test]
fn phases_are_spread_over_the_period() {
    assert_eq!([0, 1, 2, 3].map(|cpu| phase_ns(100, cpu, 4)), [0, 2_500_000, 5_000_000, 7_500_000]);
    assert_eq!(phase_ns(1, 15, 16), 937_500_000);
    assert_eq!(phase_ns(0, 0, 0), 0);
}

#[test]
fn a_second_interrupt_waits_for_the_first() {
    let link = Link::new();
    assert!(!link.take());
    link.owe();
    link.owe();
    assert!(link.take());
    assert!(!link.take(), "the first is still on its way");
    assert!(link.arrived(), "the sender waits with the second");
    assert!(link.take());
    assert!(!link.arrived());
    assert_eq!((link.owed(), link.sent(), link.received()), (0, 2, 2));
}

/// The receiver's APIC keeps one request; the sender sleeps unless it is woken. No interrupt is lost, and no CPU sleeps
/// for ever.
#[test]
fn no_interrupt_merges_and_no_sender_oversleeps() {
    const COUNT: u64 = 20_000;
    let (link, request) = (Link::new(), AtomicBool::new(false));
    let sender = thread::current();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            while link.received() != COUNT {
                if !request.swap(false, Ordering::SeqCst) {
                    thread::park();
                } else if link.arrived() {
                    sender.unpark();
                }
            }
        });
        let mut ticks = 0;
        while ticks < COUNT || link.owed() != 0 {
            if ticks < COUNT {
                link.owe();
                ticks += 1;
            }
            if link.take() {
                assert!(!request.swap(true, Ordering::SeqCst), "merged with the one before");
                receiver.thread().unpark();
            } else if ticks == COUNT && link.owed() != 0 {
                thread::park();
            }
        }
    });
    assert_eq!((link.sent(), link.received()), (COUNT, COUNT));
}

#[test]
fn a_part_reports_what_is_missing() {
    let link = Link::new();
    for _ in 0..3 {
        link.owe();
    }
    assert!(link.take());
    let part = Part::of(&link, 3, 4, 3);
    assert!(!part.complete());
    assert_eq!(part.to_string(), "cpu 3: 3 of 3 ticks, 1 IPIs sent to cpu 0, 0 received there");
    let before = part.progress();
    let _ = link.arrived();
    assert!(Part::of(&link, 3, 4, 3).progress() > before);
    while link.take() {
        let _ = link.arrived();
    }
    assert!(Part::of(&link, 3, 4, 3).complete());
}
