//! A and B in one run, in turn, so that whatever else the machine does meets both.

use anyhow::{Context, Result};

/// Somebody to be measured: a name, and a way to take one sample.
pub struct Contender<'a> {
    /// Its name in the table.
    pub who: String,
    sample: Box<dyn FnMut() -> Result<f64> + 'a>,
}

impl<'a> Contender<'a> {
    /// `who`, measured by `sample`.
    pub fn new(who: impl Into<String>, sample: impl FnMut() -> Result<f64> + 'a) -> Self {
        Self { who: who.into(), sample: Box::new(sample) }
    }
}

/// Takes `rounds` samples of each, after `warm_up` that do not count. Every other round goes the other way round: if one
/// leaves the machine faster or slower to the next, that meets both too.
///
/// # Errors
/// The first that fails, with its name.
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
    fn turns_alternate_and_the_warm_up_does_not_count() {
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
