//! Merges the shards of a sweep.

use machine::blame::{Blame, Blamed};

use super::{
    result::{Findings, SCHEMA},
    windows,
};

/// Why findings cannot be merged.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// Nothing to merge.
    #[error("there is nothing to merge: name the files of the shards")]
    Nothing,
    /// Another layout.
    #[error("{name}: its schema is {found:?}, not {SCHEMA:?}; merge with the vmm that wrote it")]
    Schema {
        /// The file.
        name: String,
        /// The schema it has.
        found: String,
    },
    /// Not of the same sweep.
    #[error("{name} is not of the same sweep as {first}: their {what} differ")]
    Differs {
        /// The file.
        name: String,
        /// The file it was compared with.
        first: String,
        /// What differs.
        what: &'static str,
    },
    /// Not a shard.
    #[error("{0} is not a shard: it was made without --shard")]
    NoShard(String),
    /// The same shard again.
    #[error("{name} is shard {index}/{count}, and so is another file")]
    Twice {
        /// The file.
        name: String,
        /// Which shard.
        index: u32,
        /// Of how many.
        count: u32,
    },
    /// A shard is missing.
    #[error("shard {index}/{count} is missing: merge all {count} of them")]
    Missing {
        /// Which.
        index: u32,
        /// Of how many.
        count: u32,
    },
    /// Its points are not those of a shard.
    #[error("{name}: its points are not those of shard {index}/{count}: {why}; run that shard again")]
    Points {
        /// The file.
        name: String,
        /// Which shard.
        index: u32,
        /// Of how many.
        count: u32,
        /// What is wrong.
        why: &'static str,
    },
    /// A shard's sweep was interrupted.
    #[error("{0} is incomplete: its sweep was interrupted; run that shard again")]
    Incomplete(String),
}

impl Blamed for MergeError {
    fn blame(&self) -> Blame {
        match self {
            Self::Nothing
            | Self::Schema { .. }
            | Self::Differs { .. }
            | Self::NoShard(_)
            | Self::Twice { .. }
            | Self::Missing { .. }
            | Self::Points { .. }
            | Self::Incomplete(_) => Blame::Usage,
        }
    }
}

/// Merges all shards of one sweep. The names are used in messages only.
///
/// # Errors
/// [`MergeError`].
pub fn merge(shards: Vec<(String, Findings)>) -> Result<Findings, MergeError> {
    let mut shards = shards.into_iter();
    let (first, mut whole) = shards.next().ok_or(MergeError::Nothing)?;
    let mut seen = vec![shard(&first, &whole)?];
    for (name, part) in shards {
        let (index, count) = shard(&name, &part)?;
        let what = [
            ("number of shards", seen.first().is_some_and(|(_, of)| *of != count)),
            ("inputs", part.inputs != whole.inputs),
            ("stretches", part.extent != whole.extent),
            ("baselines", part.baseline != whole.baseline),
        ];
        if let Some((what, _)) = what.into_iter().find(|(_, differs)| *differs) {
            return Err(MergeError::Differs { name, first, what });
        }
        if seen.contains(&(index, count)) {
            return Err(MergeError::Twice { name, index, count });
        }
        seen.push((index, count));
        whole.points.extend(part.points);
        whole.code.extend(part.code);
    }
    let count = seen.first().map_or(0, |(_, count)| *count);
    if let Some(index) = (1..=count).find(|index| !seen.contains(&(*index, count))) {
        return Err(MergeError::Missing { index, count });
    }
    whole.shard = None;
    whole.points.sort_by(|a, b| a.at.cmp(&b.at));
    whole.code.sort_by_key(|code| code.address);
    whole.code.dedup_by_key(|code| code.address);
    whole.windows = windows::windows(&whole.inputs.ratios, &whole.points);
    whole.totals = windows::totals(&whole.inputs.ratios, &whole.points);
    Ok(whole)
}

/// Checks one shard; returns its index and the number of shards.
fn shard(name: &str, findings: &Findings) -> Result<(u32, u32), MergeError> {
    if findings.schema != SCHEMA {
        return Err(MergeError::Schema { name: name.to_owned(), found: findings.schema.clone() });
    }
    if !findings.complete {
        return Err(MergeError::Incomplete(name.to_owned()));
    }
    let shard = findings.shard.ok_or_else(|| MergeError::NoShard(name.to_owned()))?;
    let (index, count) = (shard.index, shard.count);
    let bad = |why| MergeError::Points { name: name.to_owned(), index, count, why };
    if !(1..=count).contains(&index) {
        return Err(bad("there is no such shard"));
    }
    let depth = usize::try_from(findings.inputs.depth).unwrap_or(usize::MAX);
    if findings.points.iter().any(|point| point.at.len() != depth) {
        return Err(bad("a point has another number of migrations"));
    }
    if findings.points.iter().any(|point| point.outcomes.len() != findings.inputs.ratios.len()) {
        return Err(bad("a point has not been tried at every ratio"));
    }
    if !findings.points.is_sorted_by(|a, b| a.at < b.at) {
        return Err(bad("they are not in order, or one is there twice"));
    }
    // The number of single points follows from the extent; that of pairs depends on the seed and is not checked.
    let (index, count) = (u64::from(index), u64::from(count));
    let own = findings.extent.points.saturating_add(count).saturating_sub(index) / count;
    if depth == 1 && u64::try_from(findings.points.len()) != Ok(own) {
        return Err(bad("some are missing"));
    }
    Ok((shard.index, shard.count))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: files that do not belong together, reported as a sweep that found something.
    #[test]
    fn the_files_are_the_users() {
        let name = || "x".to_owned();
        let errors = [
            MergeError::Nothing,
            MergeError::Schema { name: name(), found: name() },
            MergeError::Differs { name: name(), first: name(), what: "ratios" },
            MergeError::NoShard(name()),
            MergeError::Twice { name: name(), index: 1, count: 2 },
            MergeError::Missing { index: 1, count: 2 },
            MergeError::Points { name: name(), index: 1, count: 2, why: "x" },
            MergeError::Incomplete(name()),
        ];
        assert!(errors.iter().all(|error| error.blame() == Blame::Usage));
    }
}
