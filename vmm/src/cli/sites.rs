//! `vmm sites`, and the sites that `--sites` asks for.

use std::{fs, io::Read, path::Path, process::ExitCode};

use machine::boot::{
    Image,
    find_sites::{
        Found, Kind, Origin,
        list::{ListedKind, SiteList},
    },
};

use super::{
    exit::{Error, OrFailed, Result},
    sites_args::{Sites, SitesFrom},
    text::{Text, plain},
};

/// The largest file with sites that is read, in bytes: far more than the largest number of sites takes.
const LIST_MAX: u64 = 64 << 20;

pub fn run(args: &Sites) -> Result<ExitCode> {
    let image = Image::open(&args.kernel).and_then(Image::unpacked).map_err(machine::RunError::from)?;
    let found = search(&image)?;
    let Some(output) = &args.output else {
        shown(&found).print()?;
        return Ok(ExitCode::SUCCESS);
    };
    let list = SiteList::of(&found, image.bytes());
    if output == Path::new("-") {
        Text::json(&list)?.print()?;
    } else {
        let mut text = serde_json::to_vec_pretty(&list).or_failed(|| "the list of sites")?;
        text.push(b'\n');
        fs::write(output, text).or_failed(|| format!("{}", output.display()))?;
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
            fs::File::open(path)
                .and_then(|file| file.take(LIST_MAX).read_to_end(&mut text))
                .map_err(|error| refused(error.to_string()))?;
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
        let function = site.function.as_ref().map_or(String::new(), |(name, offset)| format!("{name}+{offset:#x}"));
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
