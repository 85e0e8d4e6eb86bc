//! Conversion of a [`Command`] from and to an HTTP request.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::api::{ApiError, Command, Migrate};
use crate::live::Address;

/// Commands without arguments take no body, or an empty object.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

impl Command {
    /// Parses the command in a request.
    ///
    /// # Errors
    /// No such path, another method, a body that does not fit, or a relative snapshot directory.
    pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Self, ApiError> {
        let unknown = || ApiError::NotFound { path: path.chars().take(100).collect() };
        let name = path.strip_prefix("/v1/").ok_or_else(unknown)?;
        let allow = match name {
            "status" => "GET",
            "pause" | "resume" | "snapshot" | "migrate" | "quit" => "PUT",
            _ => return Err(unknown()),
        };
        if method != allow {
            return Err(ApiError::MethodNotAllowed { allow });
        }
        let nothing = |command| {
            if is_blank(body) { Ok(command) } else { decode(body).map(|Nothing {}| command) }
        };
        match name {
            "status" => nothing(Self::Status),
            "pause" => nothing(Self::Pause),
            "resume" => optional(body).map(Self::Resume),
            "quit" => nothing(Self::Quit),
            "migrate" => optional(body).map(Self::Migrate).and_then(Self::with_absolute_paths),
            "snapshot" => decode(body).map(Self::Snapshot).and_then(Self::with_absolute_paths),
            _ => Err(unknown()),
        }
    }

    fn with_absolute_paths(self) -> Result<Self, ApiError> {
        let paths = match &self {
            Self::Snapshot(snapshot) => [("dir", Some(&snapshot.dir)), ("base", snapshot.base.as_ref())],
            Self::Migrate(Migrate { to: Some(Address::Unix(path)), .. }) => [("to", Some(path)), ("to", None)],
            _ => return Ok(self),
        };
        for (name, path) in paths {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                return Err(ApiError::BadRequest(format!(
                    "`{name}` is the relative path {path:?}: give an absolute one, the VMM has its own working directory"
                )));
            }
        }
        Ok(self)
    }

    /// The request for this command: method, path and body.
    ///
    /// # Errors
    /// A snapshot directory that is not UTF-8 has no JSON form.
    pub fn to_request(&self) -> Result<(&'static str, &'static str, Vec<u8>), serde_json::Error> {
        Ok(match self {
            Self::Status => ("GET", "/v1/status", Vec::new()),
            Self::Pause => ("PUT", "/v1/pause", Vec::new()),
            Self::Resume(resume) => ("PUT", "/v1/resume", serde_json::to_vec(resume)?),
            Self::Quit => ("PUT", "/v1/quit", Vec::new()),
            Self::Snapshot(snapshot) => ("PUT", "/v1/snapshot", serde_json::to_vec(snapshot)?),
            Self::Migrate(migrate) => ("PUT", "/v1/migrate", serde_json::to_vec(migrate)?),
        })
    }
}

/// No body means that every field has its default.
fn optional<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, ApiError> {
    if is_blank(body) { Ok(T::default()) } else { decode(body) }
}

fn is_blank(body: &[u8]) -> bool {
    body.iter().all(u8::is_ascii_whitespace)
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::BadRequest(format!("the body is not usable: {error}")))
}

#[cfg(test)]
mod tests {
    use vmtime::{DeadlinePolicy, DowntimePolicy, Khz};

    use super::*;
    use crate::control::api::{Resume, Snapshot};

    fn refuse(method: &str, path: &str, body: &str) -> (u16, String) {
        let error = Command::parse(method, path, body.as_bytes()).unwrap_err();
        (error.code(), error.to_string())
    }

    #[test]
    fn every_command_survives_its_request() {
        let migrate = Migrate {
            tsc_khz: Some(Khz::new(1_300_000).unwrap()),
            deadline: Some(DeadlinePolicy::Keep),
            downtime: Some(DowntimePolicy::CatchUp),
            ..Migrate::default()
        };
        let away = Migrate {
            to: Some("unix:/tmp/a b".parse().unwrap()),
            max_downtime_ms: Some(3),
            insecure: true,
            ..Migrate::default()
        };
        for command in [
            Command::Status,
            Command::Pause,
            Command::Resume(Resume::default()),
            Command::Resume(Resume { deadline: Some(DeadlinePolicy::Fire), downtime: None }),
            Command::Resume(Resume { deadline: None, downtime: Some(DowntimePolicy::Freeze) }),
            Command::Quit,
            Command::Snapshot(Snapshot { dir: "/tmp/a b\"ü".into(), base: None, stay_paused: true }),
            Command::Snapshot(Snapshot { dir: "/b".into(), base: Some("/a".into()), stay_paused: false }),
            Command::Migrate(migrate),
            Command::Migrate(away),
            Command::Migrate(Migrate::default()),
        ] {
            let (method, path, body) = command.to_request().unwrap();
            assert_eq!(Command::parse(method, path, &body).unwrap(), command);
        }
    }

    #[test]
    fn policies_have_the_names_of_the_command_line_and_defaults() {
        let body = br#"{"tsc_khz": 3900000, "deadline": "fire", "downtime": "catch-up"}"#;
        let Command::Migrate(migrate) = Command::parse("PUT", "/v1/migrate", body).unwrap() else { panic!() };
        assert_eq!((migrate.deadline, migrate.downtime), (Some(DeadlinePolicy::Fire), Some(DowntimePolicy::CatchUp)));
        let Command::Migrate(migrate) = Command::parse("PUT", "/v1/migrate", br#"{"tsc_khz": 3900000}"#).unwrap()
        else {
            panic!()
        };
        assert_eq!((migrate.deadline, migrate.downtime), (None, None));
    }

    #[test]
    fn no_body_and_an_empty_object_are_the_same() {
        for body in [&b""[..], b" \r\n", b"{}"] {
            assert_eq!(Command::parse("PUT", "/v1/pause", body).unwrap(), Command::Pause);
            let (resume, migrate) = (Command::Resume(Resume::default()), Command::Migrate(Migrate::default()));
            assert_eq!(Command::parse("PUT", "/v1/resume", body).unwrap(), resume);
            assert_eq!(Command::parse("PUT", "/v1/migrate", body).unwrap(), migrate);
        }
    }

    #[test]
    fn a_wrong_path_or_method_is_answered_with_the_right_one() {
        for path in ["/", "/v1", "/v1/", "/v2/status", "/v1/status/", "/v1/status?x=1", ""] {
            assert_eq!(refuse("GET", path, "").0, 404, "{path}");
        }
        assert_eq!(refuse("GET", "/v1/pause", ""), (405, "use PUT for this path".to_owned()));
        assert_eq!(refuse("POST", "/v1/status", "").0, 405);
    }

    #[test]
    fn a_body_that_does_not_fit_is_refused() {
        for (path, body) in [
            ("/v1/pause", "null"),
            ("/v1/pause", r#"{"x": 1}"#),
            ("/v1/resume", r#"{"tsc_khz": 1300000}"#),
            ("/v1/resume", r#"{"downtime": "thaw"}"#),
            ("/v1/snapshot", ""),
            ("/v1/snapshot", "{}"),
            ("/v1/snapshot", r#"{"dir": "/a"} x"#),
            ("/v1/snapshot", r#"{"dir": "/a", "stay-paused": true}"#),
            ("/v1/snapshot", r#"{"dir": 1}"#),
            ("/v1/migrate", r#"{"tsc_khz": 1300000, "deadline": "later"}"#),
            ("/v1/migrate", r#"{"tsc_khz": -1}"#),
            ("/v1/migrate", "\u{feff}{}"),
        ] {
            assert_eq!(refuse("PUT", path, body).0, 400, "{path} {body}");
        }
        let (code, message) = refuse("PUT", "/v1/migrate", r#"{"tsc_khz": 0}"#);
        assert!(code == 400 && message.contains("a TSC frequency of 0 kHz is not between"), "{message}");
    }

    #[test]
    fn a_relative_path_is_refused_with_the_reason() {
        let (code, message) = refuse("PUT", "/v1/migrate", r#"{"to": "unix:socket"}"#);
        assert!(code == 400 && message.contains("`to` is the relative path"), "{message}");
        for dir in ["snap", "./snap", ""] {
            let (code, message) = refuse("PUT", "/v1/snapshot", &format!(r#"{{"dir": "{dir}"}}"#));
            assert!(code == 400 && message.contains("give an absolute one"), "{message}");
            let (code, message) = refuse("PUT", "/v1/snapshot", &format!(r#"{{"dir": "/d", "base": "{dir}"}}"#));
            assert!(code == 400 && message.contains("`base` is the relative path"), "{message}");
        }
    }
}
