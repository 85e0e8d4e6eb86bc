//! One counter of the 8254. Times are ticks since VM time 0.

use serde::{Deserialize, Serialize};

/// The bytes of the count that the channel's port reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessMode {
    /// The low one.
    #[default]
    Low,
    /// The high one; the other is 0.
    High,
    /// The low one, then the high one.
    Both,
}

/// Whether a channel counts, and since when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Counting {
    /// No count was written, or nothing triggered it yet.
    #[default]
    Not,
    /// The count began at this tick.
    Since(u64),
    /// The gate stopped the count after so many ticks.
    Held(u64),
}

/// A channel, as a snapshot holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelState {
    /// Mode 0 to 5.
    pub mode: u8,
    /// The count is in binary-coded decimal.
    pub decimal: bool,
    /// The bytes that the port reads and writes.
    pub access: AccessMode,
    /// The count, as written.
    pub reload: u16,
    /// The low byte of a count whose high byte was not written yet.
    pub low: Option<u8>,
    /// The next byte read is the high one.
    pub reads_high: bool,
    /// A latched count that was not read yet.
    pub latched: Option<u16>,
    /// A latched status that was not read yet.
    pub status: Option<u8>,
    /// Its gate input is high.
    pub gate: bool,
    /// Whether it counts.
    pub counting: Counting,
    /// The number of rising edges of its output since the count began that were taken, or skipped as too close.
    pub edges: u64,
}

/// A channel. All of its state is saved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Channel(ChannelState);

/// Mode 0: interrupt on terminal count. 1: one-shot, triggered by the gate. 2: rate generator. 3: square wave.
/// 4: strobe. 5: strobe, triggered by the gate.
const PERIODIC: [u8; 2] = [2, 3];
const TRIGGERED: [u8; 2] = [1, 5];

/// The fewest ticks from one periodic interrupt to the next: 200 µs, as KVM has for its own 8254
/// (`min_timer_period_us`, Linux `arch/x86/kvm/i8254.c`). With a shorter time a guest could spend all of it in its
/// handler.
const LEAST_TICKS: u64 = 239;

fn from_decimal(digits: u16) -> u64 {
    [12, 8, 4, 0].iter().fold(0, |value, shift| value * 10 + u64::from(digits >> shift & 0xf))
}

fn to_decimal(value: u64) -> u16 {
    [1000, 100, 10, 1].iter().fold(0, |digits, unit| digits << 4 | u16::try_from(value / unit % 10).unwrap_or(0))
}

impl Channel {
    pub(super) fn new(gate: bool) -> Self {
        Self(ChannelState { gate, ..ChannelState::default() })
    }

    /// One more than the largest count.
    fn modulus(&self) -> u64 {
        if self.0.decimal { 10_000 } else { 65_536 }
    }

    /// The count that it begins with; a written 0 means the largest count.
    fn length(&self) -> u64 {
        let written = if self.0.decimal { from_decimal(self.0.reload) } else { u64::from(self.0.reload) };
        // Digits above 9 make numbers above 9999.
        if written % self.modulus() == 0 { self.modulus() } else { written % self.modulus() }
    }

    /// Ticks since the count began.
    fn elapsed(&self, now: u64) -> Option<u64> {
        match self.0.counting {
            Counting::Not => None,
            Counting::Since(start) => Some(now.saturating_sub(start)),
            Counting::Held(elapsed) => Some(elapsed),
        }
    }

    fn count(&self, now: u64) -> u16 {
        let length = self.length();
        let elapsed = self.elapsed(now).unwrap_or(0);
        let part = elapsed % length;
        let count = match self.0.mode {
            2 => length - part,
            // It counts by twos. An odd count begins one lower, and the output is high for one tick more than it is
            // low.
            3 => {
                let high = length.div_ceil(2);
                (length & !1) - 2 * if part < high { part } else { part - high }
            }
            // It continues to count down after it has reached 0, and wraps.
            _ => (length + self.modulus() - elapsed % self.modulus()) % self.modulus(),
        };
        let count = count % self.modulus();
        if self.0.decimal { to_decimal(count) } else { u16::try_from(count).unwrap_or(0) }
    }

    pub(super) fn output(&self, now: u64) -> bool {
        let (length, elapsed) = (self.length(), self.elapsed(now));
        match (self.0.mode, elapsed) {
            (0, None) => false,
            (_, None) => true,
            (0 | 1, Some(elapsed)) => elapsed >= length,
            (2, Some(elapsed)) => !self.0.gate || elapsed % length != length - 1,
            (3, Some(elapsed)) => !self.0.gate || elapsed % length < length.div_ceil(2),
            (_, Some(elapsed)) => elapsed != length,
        }
    }

    /// Handles a control word for this channel, other than a read-back.
    pub(super) fn control(&mut self, value: u8, now: u64) {
        let access = match value >> 4 & 3 {
            0 => return self.latch(true, false, now),
            1 => AccessMode::Low,
            2 => AccessMode::High,
            _ => AccessMode::Both,
        };
        // Modes 6 and 7 are 2 and 3.
        let mode = match value >> 1 & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        self.0 = ChannelState { mode, access, decimal: value & 1 != 0, gate: self.0.gate, ..ChannelState::default() };
    }

    /// Latches count and status for the next reads. A value that is latched already stays.
    pub(super) fn latch(&mut self, count: bool, status: bool, now: u64) {
        if count && self.0.latched.is_none() {
            self.0.latched = Some(self.count(now));
        }
        if status && self.0.status.is_none() {
            let output = u8::from(self.output(now)) << 7;
            let null = u8::from(self.0.counting == Counting::Not) << 6;
            let access = match self.0.access {
                AccessMode::Low => 1,
                AccessMode::High => 2,
                AccessMode::Both => 3,
            } << 4;
            self.0.status = Some(output | null | access | self.0.mode << 1 | u8::from(self.0.decimal));
        }
    }

    pub(super) fn write(&mut self, value: u8, now: u64) {
        let reload = match (self.0.access, self.0.low.take()) {
            (AccessMode::Low, _) => u16::from(value),
            (AccessMode::High, _) => u16::from(value) << 8,
            (AccessMode::Both, None) => {
                self.0.low = Some(value);
                return;
            }
            (AccessMode::Both, Some(low)) => u16::from_le_bytes([low, value]),
        };
        self.0.reload = reload;
        self.0.edges = 0;
        self.0.counting = match (TRIGGERED.contains(&self.0.mode), self.0.gate) {
            (true, _) => Counting::Not,
            (false, true) => Counting::Since(now),
            (false, false) => Counting::Held(0),
        };
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.0.status.take() {
            return status;
        }
        let [low, high] = self.0.latched.unwrap_or_else(|| self.count(now)).to_le_bytes();
        let (byte, last) = match (self.0.access, self.0.reads_high) {
            (AccessMode::Low, _) => (low, true),
            (AccessMode::High, _) => (high, true),
            (AccessMode::Both, false) => (low, false),
            (AccessMode::Both, true) => (high, true),
        };
        self.0.reads_high = !last;
        if last {
            self.0.latched = None;
        }
        byte
    }

    /// Sets the gate. While it is low, the count stops; a rising edge triggers or restarts the count, depending on the
    /// mode.
    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.0.gate;
        self.0.gate = gate;
        let written = self.0.counting != Counting::Not || TRIGGERED.contains(&self.0.mode);
        self.0.counting = match self.0.counting {
            _ if rises && written && !matches!(self.0.mode, 0 | 4) => {
                self.0.edges = 0;
                Counting::Since(now)
            }
            Counting::Held(elapsed) if rises => Counting::Since(now.saturating_sub(elapsed)),
            // In modes that the gate triggers, a low gate does not stop the count.
            Counting::Since(start) if !gate && !TRIGGERED.contains(&self.0.mode) => {
                Counting::Held(now.saturating_sub(start))
            }
            other => other,
        };
    }

    /// One edge in this many is reported as an interrupt. In periodic modes reported edges are thereby at least
    /// [`LEAST_TICKS`] apart. Count and output are not affected.
    fn stride(&self) -> u64 {
        if PERIODIC.contains(&self.0.mode) { LEAST_TICKS.div_ceil(self.length()) } else { 1 }
    }

    /// The number and the tick of the next rising edge that is reported. In modes that only the gate triggers, none is.
    fn next(&self) -> Option<(u64, u64)> {
        let Counting::Since(start) = self.0.counting else { return None };
        let number = (self.0.edges / self.stride()).checked_add(1)?.checked_mul(self.stride())?;
        let after = match self.0.mode {
            mode if PERIODIC.contains(&mode) => self.length().checked_mul(number)?,
            0 if number == 1 => self.length(),
            4 if number == 1 => self.length() + 1,
            _ => return None,
        };
        Some((number, start.checked_add(after)?))
    }

    /// The tick of the next rising edge that is reported.
    pub(super) fn next_edge(&self) -> Option<u64> {
        self.next().map(|(_, tick)| tick)
    }

    pub(super) fn take_edge(&mut self, now: u64) -> bool {
        let Some((number, tick)) = self.next().filter(|(_, tick)| *tick <= now) else { return false };
        let passed = if PERIODIC.contains(&self.0.mode) { (now - tick) / self.length() } else { 0 };
        self.0.edges = number.saturating_add(passed);
        true
    }

    pub(super) fn state(self) -> ChannelState {
        self.0
    }

    pub(super) fn from_state(state: ChannelState) -> Option<Self> {
        (state.mode < 6).then_some(Self(state))
    }
}
