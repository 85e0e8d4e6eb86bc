//! The inbox compared with an unbounded queue that is emptied in order.

use std::collections::VecDeque;

use proptest::prelude::*;

use vlapic::{Delivery, DeliveryMode, Destination, Inbox, Ipi, Trigger};

use super::*;

fn message(mode: DeliveryMode, vector: u8) -> Ipi {
    Ipi { vector, mode, destination: Destination::Others, assert: true, trigger: Trigger::Edge }
}

/// The part of a CPU's state that messages can change.
#[derive(Clone, Debug, PartialEq)]
struct Receiver {
    apic: LocalApic,
    waits: bool,
    /// The page it was started at, or none since the last INIT.
    started: Option<u8>,
    /// One that enters and one that waits behind it.
    nmis: u8,
    resets: bool,
}

impl Receiver {
    fn new(bsp: bool, waits: bool, enabled: bool) -> Self {
        let mut bench = Bench::reset(Config { bsp, ..ALL });
        if enabled {
            bench.write(SVR, 0x1ff, at(0));
            bench.write(LVT_ERROR, 0xfe, at(0));
        }
        Self { apic: bench.apic, waits, started: None, nmis: 0, resets: false }
    }

    fn take(&mut self, ipi: &Ipi) {
        match self.apic.deliver(ipi) {
            Delivery::Nmi if !self.waits => self.nmis = (self.nmis + 1).min(2),
            Delivery::Init => {
                self.apic.init();
                (self.waits, self.started, self.nmis, self.resets) = (!self.apic.config().bsp, None, 0, true);
            }
            Delivery::StartUp { vector } if self.waits => (self.waits, self.started) = (false, Some(vector)),
            Delivery::None
            | Delivery::Accepted
            | Delivery::Nmi
            | Delivery::StartUp { .. }
            | Delivery::ExtInt
            | Delivery::Smi => {}
        }
    }
}

fn ipi() -> impl Strategy<Value = Ipi> {
    let fixed = (any::<u8>(), any::<bool>()).prop_map(|(vector, level)| Ipi {
        // The vector of the error interrupt is the LAPIC's own, and edge-triggered.
        trigger: if level && vector != 0xfe { Trigger::Level } else { Trigger::Edge },
        ..message(DeliveryMode::Fixed, vector)
    });
    let few = (0x40..0x44u8).prop_map(|vector| message(DeliveryMode::LowestPriority, vector));
    let deassert = Ipi { assert: false, trigger: Trigger::Level, ..message(DeliveryMode::Init, 0) };
    prop_oneof![
        6 => fixed,
        4 => few,
        4 => Just(message(DeliveryMode::Nmi, 9)),
        2 => Just(message(DeliveryMode::Init, 9)),
        4 => any::<u8>().prop_map(|page| message(DeliveryMode::StartUp, page)),
        1 => Just(message(DeliveryMode::Smi, 9)),
        1 => Just(deassert),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4000) })]

    /// However many messages come between two looks, and of whatever kinds: the receiver ends as if it had taken each.
    #[test]
    fn as_a_queue_without_end(
        [bsp, waits, enabled, off] in any::<[bool; 4]>(),
        looks in proptest::collection::vec(proptest::collection::vec(ipi(), 0..30), 1..5),
    ) {
        let mut receiver = Receiver::new(bsp, waits && !bsp, enabled);
        if off {
            receiver.apic.msr_write(APIC_BASE, 0, at(0)).unwrap();
        }
        let mut queued = receiver.clone();
        for messages in looks {
            let (mut inbox, mut queue) = (Inbox::default(), VecDeque::new());
            for ipi in messages {
                inbox.post(&ipi);
                queue.push_back(ipi);
            }
            while let Some(ipi) = queue.pop_front() {
                queued.take(&ipi);
            }
            while let Some(ipi) = inbox.take() {
                receiver.take(&ipi);
            }
            prop_assert!(inbox.is_empty());
            prop_assert_eq!(&receiver, &queued);
        }
    }
}

/// A TLB shootdown hangs if it is the message that is lost.
#[test]
fn two_thousand_messages_of_one_vector_leave_room_for_another() {
    let mut inbox = Inbox::default();
    assert!(inbox.is_empty());
    for _ in 0..2000 {
        inbox.post(&message(DeliveryMode::Fixed, 0x40));
        inbox.post(&message(DeliveryMode::Nmi, 0));
    }
    inbox.post(&message(DeliveryMode::Fixed, 0x41));
    let mut taken = Vec::new();
    while let Some(ipi) = inbox.take() {
        taken.push((ipi.mode, ipi.vector));
    }
    let [nmi, fixed] = [DeliveryMode::Nmi, DeliveryMode::Fixed];
    assert_eq!(taken, [(nmi, 0), (nmi, 0), (fixed, 0x41), (fixed, 0x40)]);
}

#[test]
fn init_discards_what_came_before_and_the_first_start_up_after_it_counts() {
    let mut inbox = Inbox::default();
    for (mode, vector) in [
        (DeliveryMode::Fixed, 0x40),
        (DeliveryMode::StartUp, 1),
        (DeliveryMode::Nmi, 0),
        (DeliveryMode::Init, 0),
        (DeliveryMode::StartUp, 2),
        (DeliveryMode::StartUp, 3),
    ] {
        inbox.post(&message(mode, vector));
    }
    let taken = [(); 3].map(|()| inbox.take().map(|ipi| (ipi.mode, ipi.vector)));
    assert_eq!(taken, [Some((DeliveryMode::Init, 0)), Some((DeliveryMode::StartUp, 2)), None]);
}

#[test]
fn what_does_nothing_is_not_kept() {
    let mut inbox = Inbox::default();
    inbox.post(&message(DeliveryMode::Smi, 0x40));
    inbox.post(&Ipi { assert: false, trigger: Trigger::Level, ..message(DeliveryMode::Init, 0) });
    assert!(inbox.is_empty());
}

#[test]
fn an_inbox_is_empty_until_a_message_waits() {
    let mut inbox = Inbox::default();
    assert!(inbox.is_empty());
    inbox.post(&message(DeliveryMode::Smi, 0));
    assert!(inbox.is_empty(), "an SMI does nothing here");
    inbox.post(&message(DeliveryMode::Fixed, 0x51));
    assert!(!inbox.is_empty());
    assert!(inbox.take().is_some() && inbox.is_empty());
}
