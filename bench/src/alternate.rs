//! Measures several contenders alternately in one run, so that other load on the machine affects all of them alike.

use anyhow::{Context, Result};

/// A program or variant under measurement: its name, and a function that takes one sample.
pub struct Contender<'a> {
    /// Its name in the table.
    pub who: String,
    sample: Box<dyn FnMut() -> Result<f64> + 'a>,
}

impl<'a> Contender<'a> {
    /// The contender `who`; `sample` takes one sample.
    pub fn new(who: impl Into<String>, sample: impl FnMut() -> Result<f64> + 'a) -> Self {
        Self { who: who.into(), sample: Box::new(sample) }
    }
}

/// Takes `rounds` samples of each, after `warm_up` rounds that are dropped. Every other round has the reverse order: if
/// a contender leaves the machine faster or slower for the next, that affects all of them alike, too.
///
/// # Errors
/// The error of the first sample that fails, with the contender's name.
pub fn alternate(contenders: &mut [Contender<'_>], warm_up: usize, rounds: usize) -> Result<Vec<(String, Vec<f64>)>> {
    let mut taken: Vec<(String, Vec<f64>)> = contenders.iter().map(|one| (one.who.clone(), Vec::new())).collect();
    for round in 0..warm_up.saturating_add(rounds) {
        let mut turn: Vec<_> = contenders.iter_mut().zip(&mut taken).collect();
        if round % 2 == 1 {
            turn.reverse();
        }
        for (one, (who, samples)) in turn {
            let sample = (one.sample)().with_context(|| who.clone())?;
            if round >= warm_up {
                samples.push(sample);
            }
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn the_order_alternates_and_the_warm_up_is_dropped() {
        let order = RefCell::new(String::new());
        let taker = |name: char| {
            let order = &order;
            Contender::new(name, move || {
                order.borrow_mut().push(name);
                Ok(1.0)
            })
        };
        let taken = alternate(&mut [taker('a'), taker('b')], 1, 3).unwrap();
        assert_eq!(*order.borrow(), "abbaabba");
        assert!(taken.iter().all(|(_, samples)| samples.len() == 3));
    }
}
