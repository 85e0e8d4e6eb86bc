//! Parsing one HTTP request, and rendering one response.

use serde::Serialize;

use super::api::{ApiError, Reply};

/// The most bytes of request line and headers.
const HEAD_BYTES: usize = 16 << 10;
/// The most bytes of a body. The largest holds a path of at most 4096 bytes.
pub(super) const BODY_BYTES: usize = 64 << 10;
/// The most header fields.
const HEADERS: usize = 64;

/// A whole request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
}

/// The result of parsing the bytes received so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// Not yet a whole request. If `wants_continue`, the client waits for "100 Continue" before it sends the body.
    Partial { wants_continue: bool },
    /// A whole request. What follows it is ignored: a connection carries one.
    Whole(Request),
}

/// Parses the request at the start of `buffer`, which grows from call to call.
///
/// # Errors
/// If no further bytes can make it a valid request.
pub(super) fn parse(buffer: &[u8]) -> Result<Parsed, ApiError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let head_bytes = match head.parse(buffer) {
        Ok(httparse::Status::Complete(bytes)) if bytes <= HEAD_BYTES => bytes,
        Ok(httparse::Status::Partial) if buffer.len() <= HEAD_BYTES => {
            return Ok(Parsed::Partial { wants_continue: false });
        }
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Err(ApiError::HeadersTooLarge),
        Err(error) => return Err(ApiError::BadRequest(format!("not an HTTP/1.1 request: {error}"))),
    };
    let body_bytes = body_bytes(head.headers)?;
    let (Some(method), Some(path), Some(rest)) = (head.method, head.path, buffer.get(head_bytes..)) else {
        return Err(ApiError::BadRequest("not an HTTP/1.1 request: no request line".to_owned()));
    };
    match rest.get(..body_bytes) {
        Some(body) => {
            Ok(Parsed::Whole(Request { method: method.to_owned(), path: path.to_owned(), body: body.to_vec() }))
        }
        None => {
            let wants_continue = fields(head.headers, "expect").any(|v| v.eq_ignore_ascii_case(b"100-continue"));
            Ok(Parsed::Partial { wants_continue })
        }
    }
}

fn fields<'a>(headers: &'a [httparse::Header<'a>], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
}

/// The length of the body (RFC 9112, "Message Body Length"). Anything but one plain Content-Length is refused, so that
/// there is only one reading of where a body ends.
fn body_bytes(headers: &[httparse::Header<'_>]) -> Result<usize, ApiError> {
    if fields(headers, "transfer-encoding").next().is_some() {
        return Err(ApiError::LengthRequired);
    }
    let mut lengths = fields(headers, "content-length");
    let Some(value) = lengths.next() else { return Ok(0) };
    let number = || {
        // `parse` alone would take a plus sign.
        let text = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()))?;
        text.parse::<u64>().ok()
    };
    match (number(), lengths.next()) {
        (Some(bytes), None) => match usize::try_from(bytes) {
            Ok(fits) if fits <= BODY_BYTES => Ok(fits),
            _ => Err(ApiError::TooLarge { bytes, limit: BODY_BYTES }),
        },
        _ => Err(ApiError::BadRequest("Content-Length is not one number".to_owned())),
    }
}

/// The bytes of a whole response.
pub(super) fn render(result: &Result<Reply, ApiError>) -> Vec<u8> {
    #[derive(Serialize)]
    struct ErrorBody {
        error: String,
    }
    let (code, body) = match result {
        Ok(Reply::Done) => (204, None),
        Ok(Reply::Status(status)) => (200, Some(serde_json::to_vec(status))),
        Ok(Reply::Moved(figures)) => (200, Some(serde_json::to_vec(figures))),
        Err(error) => (error.code(), Some(serde_json::to_vec(&ErrorBody { error: error.to_string() }))),
    };
    // Serializing these types cannot fail. If it did, the response would have no body.
    let body = body.and_then(Result::ok).map(|mut json| {
        json.push(b'\n');
        json
    });
    let mut out = format!("HTTP/1.1 {code} {}\r\nConnection: close\r\n", reason(code));
    if let Err(ApiError::MethodNotAllowed { allow }) = result {
        out.push_str(&format!("Allow: {allow}\r\n"));
    }
    if let Some(body) = &body {
        out.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
    }
    out.push_str("\r\n");
    let mut out = out.into_bytes();
    out.extend(body.unwrap_or_default());
    out
}

fn reason(code: u16) -> &'static str {
    match code {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PUT: &[u8] = b"PUT /v1/snapshot HTTP/1.1\r\nHost: localhost\r\ncontent-LENGTH: 4\r\n\r\n{} \n";

    fn code(request: &[u8]) -> u16 {
        parse(request).unwrap_err().code()
    }

    #[test]
    fn a_request_may_arrive_in_any_pieces() {
        for cut in 0..PUT.len() {
            assert_eq!(parse(&PUT[..cut]).unwrap(), Parsed::Partial { wants_continue: false }, "{cut}");
        }
        let whole = Request { method: "PUT".into(), path: "/v1/snapshot".into(), body: b"{} \n".to_vec() };
        assert_eq!(parse(PUT).unwrap(), Parsed::Whole(whole.clone()));
        assert_eq!(parse(&[PUT, b"GET / HTTP/1.1\r\n"].concat()).unwrap(), Parsed::Whole(whole));
    }

    #[test]
    fn a_client_that_waits_for_100_continue_is_noticed() {
        let head = b"PUT /v1/pause HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(parse(head).unwrap(), Parsed::Partial { wants_continue: true });
        assert!(matches!(parse(&[&head[..], b"{}"].concat()).unwrap(), Parsed::Whole(_)));
    }

    #[test]
    fn what_is_not_plain_http_is_refused() {
        for request in [
            &b"\x16\x03\x01\x02\x00\x01"[..],
            b"GET\r\n",
            b"GET / HTTP/2.0\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"PUT / HTTP/1.1\r\nContent-Length:\r\n\r\n",
            b"PUT / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n",
            b"PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
            b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        ] {
            assert_eq!(code(request), 400, "{:?}", String::from_utf8_lossy(request));
        }
        assert_eq!(code(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 411);
    }

    #[test]
    fn size_is_refused_before_it_is_received() {
        assert_eq!(code(b"PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n"), 413);
        assert!(parse(b"PUT / HTTP/1.1\r\nContent-Length: 65536\r\n\r\n").is_ok());
        assert_eq!(code(&[b"GET /", [b'a'; HEAD_BYTES].as_slice()].concat()), 431);
        assert_eq!(code(&[b"GET / HTTP/1.1\r\n".to_vec(), b"A: b\r\n".repeat(HEADERS + 1)].concat()), 431);
    }

    #[test]
    fn responses_say_how_long_they_are() {
        let error = render(&Err(ApiError::MethodNotAllowed { allow: "PUT" }));
        assert_eq!(
            String::from_utf8(error).unwrap(),
            "HTTP/1.1 405 Method Not Allowed\r\nConnection: close\r\nAllow: PUT\r\n\
             Content-Type: application/json\r\nContent-Length: 34\r\n\r\n{\"error\":\"use PUT for this path\"}\n"
        );
        assert_eq!(render(&Ok(Reply::Done)), b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
    }

    proptest! {
        #[test]
        fn random_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
            let _ = parse(&[b"PUT / HTTP/1.1\r\n", bytes.as_slice(), b"\r\n\r\n"].concat());
        }
    }
}
