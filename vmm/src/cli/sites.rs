//! `vmm sites`, and the sites that `--sites` asks for.

use std::{fs, io::Read, process::ExitCode};

use machine::{
    boot::{
        Image,
        find_sites::{
            Found, Kind, Origin,
            list::{ListedKind, SiteList},
        },
    },
    host::regular_file::open_regular,
};

use super::{
    exit::{Error, Result},
    output::{self, OutFile},
    sites_args::{Sites, SitesFrom},
    text::{Text, plain, printable},
};

/// The largest file with sites that is read, in bytes: far more than the largest number of sites takes.
const LIST_MAX: u64 = 64 << 20;

/// Characters of a function's name that are shown at most.
const NAME_CHARS: usize = 100;

pub fn run(args: &Sites) -> Result<ExitCode> {
    let image = Image::open(&args.kernel).and_then(Image::unpacked).map_err(machine::RunError::from)?;
    let found = search(&image)?;
    if let Some(output) = &args.output
        && let (Ok(output), Ok(kernel)) = (fs::canonicalize(output), fs::canonicalize(&args.kernel))
        && output == kernel
    {
        return Err(Error::usage(format!("--output {} is the kernel itself: name another file", output.display())));
    }
    match OutFile::open("output", args.output.as_deref())? {
        Some(file) => file.write(&output::json(&SiteList::of(&found, image.bytes()))?)?,
        None => shown(&found).print()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The image with the sites that `--sites` asks for.
pub fn with_sites(image: Image, from: Option<&SitesFrom>) -> Result<Image> {
    let Some(from) = from else { return Ok(image) };
    let image = image.unpacked().map_err(machine::RunError::from)?;
    let sites = match from {
        SitesFrom::Auto => {
            let found = search(&image)?;
            machine::say!("vmm: {}", summary(&found));
            found.table().map_err(|error| Error::usage(format!("--sites auto: {}: {error}", image.name())))?
        }
        SitesFrom::File(path) => {
            let refused = |error: String| Error::usage(format!("--sites {}: {error}", path.display()));
            let mut text = Vec::new();
            let (file, bytes) = open_regular(path).map_err(|error| refused(error.to_string()))?;
            if bytes > LIST_MAX {
                return Err(refused(format!("larger than {LIST_MAX} bytes, which no list of sites is")));
            }
            file.take(bytes).read_to_end(&mut text).map_err(|error| refused(error.to_string()))?;
            let table = SiteList::parse(&text).and_then(|list| list.table(image.bytes()));
            table.map_err(|error| refused(error.to_string()))?
        }
    };
    Ok(image.with_found_sites(sites))
}

fn search(image: &Image) -> Result<Found> {
    Found::search(image.bytes())
        .map_err(|error| Error::usage(format!("no trap sites can be found in {}: {error}", image.name())))
}

/// The counts, in one line.
fn summary(found: &Found) -> String {
    let Found { sites, rdtscp, unsure, other_wrmsr } = found;
    let copied = sites.iter().filter(|found| matches!(found.origin, Origin::CopiedFrom(_))).count();
    let mut text = format!(
        "{} trap sites: {} RDTSC, {} WRMSR of the TSC deadline, {} PAUSE; {copied} of them are places that the kernel \
         copies code to",
        sites.len(),
        found.count(Kind::Rdtsc),
        found.count(Kind::DeadlineWrmsr),
        found.count(Kind::Pause),
    );
    for (count, what) in [
        (rdtscp.len(), "RDTSCP, which CPUID does not offer"),
        (unsure.len(), "RDTSC or data, left alone"),
        (usize::try_from(*other_wrmsr).unwrap_or(usize::MAX), "WRMSR of other or unknown MSRs"),
    ] {
        if count > 0 {
            text.push_str(&format!("; {count} {what}"));
        }
    }
    text
}

fn shown(found: &Found) -> Text {
    let mut table = plain(["address", "physical", "kind", "function", ""]);
    for site in &found.sites {
        let function = site
            .function
            .as_ref()
            .map_or(String::new(), |(name, offset)| format!("{}+{offset:#x}", printable(name, NAME_CHARS)));
        let kind = ListedKind::from(site.kind).as_str();
        let origin = match site.origin {
            Origin::Code => String::new(),
            Origin::Replacement => "stored there, to be copied".to_owned(),
            Origin::CopiedFrom(from) => format!("copied there from {from:#x}"),
        };
        let physical = site.site.physical.unwrap_or(site.site.address);
        table.add_row([
            format!("{:#x}", site.site.address),
            format!("{physical:#x}"),
            kind.to_owned(),
            function,
            origin,
        ]);
    }
    let mut text = Text::default();
    text.table(table, 0..2);
    text.line(summary(found));
    text
}
