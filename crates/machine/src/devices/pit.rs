//! The 8254 programmable interval timer (Intel, "82C54 CHMOS Programmable Interval Timer"), connected as in a PC:
//! channel 0's output is input 0 of the 8259 pair; channel 2 has its gate and its output in port 0x61.
//!
//! It counts VM time at 1,193,182 Hz. It has no thread or host timer: every access has the time as an argument, and
//! [`Pit::next_edge`] returns when channel 0 will interrupt.
//!
//! Periodic interrupts are at least 239 ticks (200 µs) apart, as with KVM's 8254. If the guest programs a shorter
//! period, not every edge interrupts. Count and output are as programmed.

mod channel;

use serde::{Deserialize, Serialize};

use self::channel::Channel;
pub use self::channel::{AccessMode, ChannelState, Counting};
use vmtime::VmTime;

/// Ports of the three channels, and the control port.
const CHANNEL_0: u16 = 0x40;
const CONTROL: u16 = 0x43;
/// PC system control port B: gate and output of channel 2.
const PORT_B: u16 = 0x61;
const PORT_B_GATE: u8 = 1 << 0;
const PORT_B_WRITABLE: u8 = 0x03;
const PORT_B_REFRESH: u8 = 1 << 4;
const PORT_B_OUTPUT: u8 = 1 << 5;

/// The frequency of its counters.
const HZ: u128 = 1_193_182;
const NS: u128 = 1_000_000_000;
/// How often the refresh bit of port 0x61 changes: with each memory refresh, about every 15 µs. Guests measure time
/// with it.
const REFRESH_NS: u64 = 15_085;

/// Ticks since VM time 0.
fn ticks(now: VmTime) -> u64 {
    u64::try_from(u128::from(now.0) * HZ / NS).unwrap_or(u64::MAX)
}

/// The first instant at which [`ticks`] returns `ticks`; none if that is beyond the end of VM time.
fn instant(ticks: u64) -> Option<VmTime> {
    u64::try_from((u128::from(ticks) * NS).div_ceil(HZ)).ok().map(VmTime)
}

/// The timer's state, as a snapshot holds it; times are in ticks since VM time 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PitState {
    /// The three channels.
    pub channels: [ChannelState; 3],
    /// The bits of port 0x61 that a guest writes.
    pub port_b: u8,
}

/// The timer.
#[derive(Clone, Copy, Debug)]
pub struct Pit {
    channels: [Channel; 3],
    port_b: u8,
}

impl Default for Pit {
    /// After power-up: no channel counts.
    fn default() -> Self {
        let [open, closed] = [true, false].map(Channel::new);
        Self { channels: [open, open, closed], port_b: 0 }
    }
}

impl Pit {
    /// Programmed as by a PC's firmware: channel 0 interrupts 18.2 times a second.
    #[must_use]
    pub fn ticking(now: VmTime) -> Self {
        let mut pit = Self::default();
        for (port, value) in [(CONTROL, 0x34), (CHANNEL_0, 0), (CHANNEL_0, 0)] {
            pit.write(port, value, now);
        }
        pit
    }

    /// Whether `port` is one of the timer's.
    #[must_use]
    pub fn owns(port: u16) -> bool {
        matches!(port, CHANNEL_0..=CONTROL | PORT_B)
    }

    fn channel(&mut self, port: u16) -> Option<&mut Channel> {
        self.channels.get_mut(usize::from(port.checked_sub(CHANNEL_0)?))
    }

    /// OUT of a byte.
    pub fn write(&mut self, port: u16, value: u8, now: VmTime) {
        let now = ticks(now);
        match port {
            CONTROL => self.control(value, now),
            PORT_B => {
                self.port_b = value & PORT_B_WRITABLE;
                let [.., last] = &mut self.channels;
                last.set_gate(value & PORT_B_GATE != 0, now);
            }
            _ => {
                if let Some(channel) = self.channel(port) {
                    channel.write(value, now);
                }
            }
        }
    }

    fn control(&mut self, value: u8, now: u64) {
        match value >> 6 {
            // Read-back: bits 1 to 3 select channels; bit 4 set means no status, bit 5 set no count.
            3 => {
                for (bit, channel) in (1..).zip(&mut self.channels) {
                    if value & 1 << bit != 0 {
                        channel.latch(value & 1 << 5 == 0, value & 1 << 4 == 0, now);
                    }
                }
            }
            number => {
                if let Some(channel) = self.channels.get_mut(usize::from(number)) {
                    channel.control(value, now);
                }
            }
        }
    }

    /// IN of a byte.
    pub fn read(&mut self, port: u16, now: VmTime) -> u8 {
        if port == PORT_B {
            let [.., last] = &self.channels;
            let output = if last.output(ticks(now)) { PORT_B_OUTPUT } else { 0 };
            let refresh = if now.0 / REFRESH_NS % 2 == 1 { PORT_B_REFRESH } else { 0 };
            return self.port_b | output | refresh;
        }
        let ticks = ticks(now);
        // The control port cannot be read.
        self.channel(port).map_or(0xff, |channel| channel.read(ticks))
    }

    /// Whether channel 0's output rose since the last call. Several edges count as one, as in the 8259.
    pub fn take_edge(&mut self, now: VmTime) -> bool {
        let [channel, ..] = &mut self.channels;
        // Most guests do not use it, and this is called often.
        channel.next_edge().is_some() && channel.take_edge(ticks(now))
    }

    /// When channel 0's output rises next.
    #[must_use]
    pub fn next_edge(&self) -> Option<VmTime> {
        let [channel, ..] = &self.channels;
        channel.next_edge().and_then(instant)
    }

    /// Whether channel 0's output is high.
    #[must_use]
    pub fn output(&self, now: VmTime) -> bool {
        let [channel, ..] = &self.channels;
        channel.output(ticks(now))
    }

    /// For a snapshot.
    #[must_use]
    pub fn state(&self) -> PitState {
        let Self { channels, port_b } = *self;
        PitState { channels: channels.map(|channel| channel.state()), port_b }
    }

    /// A timer with a saved state; none if a timer cannot have that state.
    #[must_use]
    pub fn from_state(state: &PitState) -> Option<Self> {
        let PitState { channels: [a, b, c], port_b } = *state;
        let channels = [Channel::from_state(a)?, Channel::from_state(b)?, Channel::from_state(c)?];
        (port_b & !PORT_B_WRITABLE == 0).then_some(Self { channels, port_b })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(tick: u64) -> VmTime {
        instant(tick).unwrap()
    }

    fn counter(pit: &mut Pit, channel: u16, tick: u64) -> u16 {
        // Latch, then low and high.
        pit.write(CONTROL, u8::try_from(channel).unwrap() << 6, at(tick));
        let [low, high] = [0; 2].map(|_: u8| pit.read(CHANNEL_0 + channel, at(tick)));
        u16::from_le_bytes([low, high])
    }

    fn programmed(control: u8, port: u16, count: u16) -> Pit {
        let mut pit = Pit::default();
        pit.write(CONTROL, control, at(0));
        for byte in count.to_le_bytes() {
            pit.write(port, byte, at(0));
        }
        pit
    }

    proptest! {
        #[test]
        fn instants_and_ticks_are_inverse(tick in 0..u64::MAX / 1000) {
            prop_assert_eq!(ticks(at(tick)), tick);
            prop_assert!(tick == 0 || ticks(VmTime(at(tick).0 - 1)) == tick - 1);
        }

        // Every mode, reload value and time, compared with the data sheet's definition of the count.
        #[test]
        fn counts(mode in 0u8..6, reload in 2u16.., tick in 0u64..1 << 40) {
            let mut pit = programmed(0x30 | mode << 1, CHANNEL_0, reload);
            let n = u64::from(reload);
            let expected = match mode {
                0 | 4 => (n + (1 << 41) - tick) % 65536,
                2 => n - tick % n,
                // 4 2 4 2, or 4 2 0 4 2.
                3 => {
                    let halves = [0u64..n.div_ceil(2), 0u64..n / 2].map(|half| half.map(|part| (n & !1) - 2 * part));
                    halves.into_iter().flatten().nth(usize::try_from(tick % n).unwrap()).unwrap()
                }
                // Gate-triggered, and channel 0's gate never rises.
                _ => n,
            };
            prop_assert_eq!(u64::from(counter(&mut pit, 0, tick)), expected % 65536);
        }

        #[test]
        fn periodic_modes_interrupt_every_period(mode in 2u8..4, reload in 2u16.., skipped in 0u64..1000) {
            let mut pit = programmed(0x30 | mode << 1, CHANNEL_0, reload);
            let period = (1u64..).map(|edge| edge * u64::from(reload)).find(|ticks| *ticks >= 239).unwrap();
            prop_assert!(!pit.take_edge(at(period - 1)));
            let late = period * (skipped + 1) + period / 2;
            prop_assert_eq!(pit.next_edge(), Some(at(period)));
            prop_assert!(pit.take_edge(at(late)));
            prop_assert!(!pit.take_edge(at(late)), "once for all that passed");
            prop_assert_eq!(pit.next_edge(), Some(at(period * (skipped + 2))));
        }

        // For random accesses at random times: no panic, and a restored timer is the same.
        #[test]
        fn random_guests(ops in prop::collection::vec((any::<bool>(), 0u16..5, any::<u8>(), any::<u64>()), 0..200)) {
            let mut pit = Pit::default();
            let mut now = 0u64;
            for (write, port, value, step) in ops {
                now = now.saturating_add(step >> (value & 63));
                let port = if port == 4 { PORT_B } else { CHANNEL_0 + port };
                if write { pit.write(port, value, VmTime(now)) } else { let _ = pit.read(port, VmTime(now)); }
                let edge = pit.next_edge();
                prop_assert_eq!(edge.is_some_and(|edge| edge <= VmTime(now)), pit.take_edge(VmTime(now)));
                prop_assert_eq!(Pit::from_state(&pit.state()).map(|pit| pit.state()), Some(pit.state()));
            }
        }
    }

    /// At rates of up to 1.2 MHz the guest must still make progress between two interrupts.
    #[test]
    fn a_rate_that_is_too_fast_interrupts_every_200_microseconds() {
        for (mode, reload) in [(2, 1), (2, 2), (3, 2), (2, 100), (3, 239)] {
            let mut pit = programmed(0x30 | mode << 1, CHANNEL_0, reload);
            let edges = (0..1_193_182).filter(|tick| pit.take_edge(at(*tick))).count();
            assert!((3900..=5000).contains(&edges), "{edges} in a second, mode {mode}, {reload}");
        }
        let mut slow = programmed(0x34, CHANNEL_0, 240);
        assert_eq!((slow.take_edge(at(239)), slow.take_edge(at(240)), slow.next_edge()), (false, true, Some(at(480))));
    }

    #[test]
    fn one_shot_interrupts_once() {
        let mut pit = programmed(0x30, CHANNEL_0, 1000);
        assert_eq!(pit.next_edge(), Some(at(1000)));
        assert!(!pit.take_edge(at(999)) && pit.take_edge(at(1000)) && !pit.take_edge(at(90_000)));
        assert_eq!(pit.next_edge(), None);
    }

    #[test]
    fn ticks_as_firmware_leaves_it() {
        let mut pit = Pit::ticking(at(5));
        assert_eq!(pit.next_edge(), Some(at(65541)));
        assert_eq!(counter(&mut pit, 0, 6), 65535);
    }

    #[test]
    fn guests_calibrate_with_channel_2_and_port_61() {
        let mut pit = Pit::default();
        pit.write(PORT_B, 1, at(0));
        pit.write(CONTROL, 0xb0, at(0));
        pit.write(0x42, 0x10, at(10));
        pit.write(0x42, 0x27, at(20));
        assert_eq!(pit.read(PORT_B, at(10_019)) & PORT_B_OUTPUT, 0);
        assert_eq!(pit.read(PORT_B, at(10_020)) & PORT_B_OUTPUT, PORT_B_OUTPUT);
        // The gate holds the count.
        let mut pit = programmed(0xb0, 0x42, 1000);
        assert_eq!(counter(&mut pit, 2, 500), 1000);
        pit.write(PORT_B, 1, at(600));
        pit.write(PORT_B, 0, at(700));
        assert_eq!(counter(&mut pit, 2, 800), 900);
        assert_eq!(pit.next_edge(), None);
    }

    #[test]
    fn read_back_returns_mode_and_output() {
        let mut pit = programmed(0x36, CHANNEL_0, 100);
        pit.write(CONTROL, 0xe2, at(10));
        assert_eq!(pit.read(CHANNEL_0, at(10)), 0x80 | 0x36);
    }

    #[test]
    fn decimal_counts_stay_decimal() {
        let mut pit = programmed(0x31, CHANNEL_0, 0x1000);
        assert_eq!(counter(&mut pit, 0, 1), 0x0999);
        assert_eq!(counter(&mut pit, 0, 1001), 0x9999);
    }
}
