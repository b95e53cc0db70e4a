//! A stored content as an HTTP answer: validators, ranges, encodings.
//!
//! elfutils' server sends whole files only, without ETag, Range or HEAD, and Fedora compresses each answer
//! anew in a proxy. Here a strong ETag is the content's hash, a range reads its frames only, and
//! a client that accepts zstd is sent the stored bytes. What is asked for often comes from a checked copy (see module `copies`);
//! of anything else the first piece is read before the head is
//! sent, so most trouble shows while nothing has been promised yet. The ETag of the zstd form ends in `-zstd`,
//! since a strong validator names bytes, and both are accepted back.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};

use crate::blob::{Blob, BlobError, Form};
use crate::copies::Source;
use crate::error::ServiceError;
use crate::sendfile::Outlet;
use crate::service::App;

/// What never changes under its URL: nothing can be in front of it, and nothing replace it.
pub(crate) const IMMUTABLE: &str = "public, max-age=31536000, immutable";
/// What may be replaced by something better: revalidated each time, which costs a 304.
pub(crate) const REVALIDATE: &str = "public, no-cache";

/// Size of what is delivered, in bytes.
pub(crate) const SIZE_HEADER: HeaderName = HeaderName::from_static("x-debuginfod-size");
/// Base name of the file it comes from.
pub(crate) const FILE_HEADER: HeaderName = HeaderName::from_static("x-debuginfod-file");

/// What to deliver, and how.
pub(crate) struct Delivery {
    /// The content.
    pub(crate) blob: Blob,
    /// The part of it that the URL names, for sections; the whole if `None`.
    pub(crate) part: Option<Range<u64>>,
    /// Seconds since 1970.
    pub(crate) modified_s: u64,
    /// Base name for `X-DEBUGINFOD-FILE`.
    pub(crate) file_name: String,
    /// `Content-Type`.
    pub(crate) content_type: &'static str,
    /// `Cache-Control`.
    pub(crate) cache_control: &'static str,
}

impl Delivery {
    /// Answers a GET or HEAD.
    pub(crate) async fn answer(self, app: &Arc<App>, parts: &Parts) -> Result<Response, ServiceError> {
        let request = &parts.headers;
        let part = self.part.clone().unwrap_or(0..self.blob.size);
        let size = part.end - part.start;
        let tag = match &self.part {
            None => format!("sha256-{}", self.blob.hash),
            Some(part) => format!("sha256-{}-{}-{}", self.blob.hash, part.start, part.end),
        };
        let mut headers = self.headers(size);
        if let Some(asked) = text(request, &header::IF_NONE_MATCH)
            && tag_matches(asked, &tag)
        {
            headers.insert(header::ETAG, quoted(&tag));
            return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        let range = range_of(request, &tag, size);
        if range.is_none() && self.part.is_none() && accepts_zstd(request) {
            headers.insert(header::ETAG, quoted(&format!("{tag}-zstd")));
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("zstd"));
            headers.insert(header::CONTENT_LENGTH, self.blob.stored_size.into());
            let body = body(app, parts, self.blob, Form::Stored, 0..self.blob.stored_size).await?;
            return Ok((headers, body).into_response());
        }
        headers.insert(header::ETAG, quoted(&tag));
        let (status, wanted) = match range {
            None => (StatusCode::OK, 0..size),
            Some(Ok(range)) => {
                headers.insert(
                    header::CONTENT_RANGE,
                    ascii(&format!("bytes {}-{}/{size}", range.start, range.end - 1)),
                );
                (StatusCode::PARTIAL_CONTENT, range)
            }
            Some(Err(Unsatisfiable)) => {
                headers.insert(header::CONTENT_RANGE, ascii(&format!("bytes */{size}")));
                return Ok((StatusCode::RANGE_NOT_SATISFIABLE, headers).into_response());
            }
        };
        headers.insert(header::CONTENT_LENGTH, (wanted.end - wanted.start).into());
        let wanted = part.start + wanted.start..part.start + wanted.end;
        let body = body(app, parts, self.blob, Form::Content, wanted).await?;
        Ok((status, headers, body).into_response())
    }

    fn headers(&self, size: u64) -> HeaderMap {
        let modified = UNIX_EPOCH + Duration::from_secs(self.modified_s.min(MAX_HTTP_DATE_S));
        let mut headers = HeaderMap::new();
        headers.insert(header::LAST_MODIFIED, ascii(&httpdate::fmt_http_date(modified)));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(self.cache_control));
        headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
        headers.insert(SIZE_HEADER, size.into());
        if !self.file_name.is_empty() {
            let name = percent_encoding::utf8_percent_encode(&self.file_name, percent_encoding::CONTROLS);
            headers.insert(FILE_HEADER, ascii(&name.to_string()));
        }
        headers
    }
}

/// 9999-12-31, the last day of an HTTP date.
const MAX_HTTP_DATE_S: u64 = 253_402_300_799;

fn ascii(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("callers pass printable ASCII")
}

fn quoted(tag: &str) -> HeaderValue {
    ascii(&format!("\"{tag}\""))
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// `range` of a form of `blob`; of the stored form, the whole.
async fn body(
    app: &Arc<App>,
    request: &Parts,
    blob: Blob,
    form: Form,
    range: Range<u64>,
) -> Result<Body, ServiceError> {
    if request.method == Method::HEAD {
        return Ok(Body::empty());
    }
    let outlet = request.extensions.get::<Outlet>();
    match app.copies.source(&app.blobs, blob, form, &range).await {
        Ok(Some(Source::Memory(bytes))) => Ok(Body::from(bytes)),
        Ok(Some(Source::Copy(copy))) => match outlet {
            Some(outlet) => {
                outlet.announce(&copy);
                Ok(Body::from(copy.mapped(range)))
            }
            None => streamed(app, blob, copy.pieces(range)).await,
        },
        Ok(None) if form == Form::Stored => streamed(app, blob, app.blobs.stream_stored(blob)).await,
        Ok(None) => streamed(app, blob, app.blobs.stream(blob, range)).await,
        Err(error) => {
            report(app, blob, &error);
            Err(error.into())
        }
    }
}

fn report(app: &Arc<App>, blob: Blob, error: &BlobError) {
    tracing::error!("delivering {}: {error}", blob.hash);
    app.metrics.count("error_count", "libc", "delivery");
    if matches!(error, BlobError::Damaged { .. }) {
        app.report_damage(blob.hash);
    }
}

/// A failure of the first piece is an error; a later one an error of the body, which becomes a reset of the
/// connection.
async fn streamed(
    app: &Arc<App>,
    blob: Blob,
    pieces: impl Stream<Item = Result<Bytes, BlobError>> + Send + 'static,
) -> Result<Body, ServiceError> {
    let reporter = Arc::clone(app);
    let mut pieces = Box::pin(pieces.inspect(move |piece| {
        if let Err(error) = piece {
            report(&reporter, blob, error);
        }
    }));
    let first = pieces.next().await.transpose()?;
    Ok(Body::from_stream(stream::iter(first.map(Ok)).chain(pieces)))
}

fn tag_matches(asked: &str, tag: &str) -> bool {
    asked.split(',').map(str::trim).any(|candidate| {
        let candidate = candidate.strip_prefix("W/").unwrap_or(candidate).trim_matches('"');
        candidate == "*" || candidate.strip_suffix("-zstd").unwrap_or(candidate) == tag
    })
}

/// Whether `Accept-Encoding` lists zstd with a weight above 0.
fn accepts_zstd(request: &HeaderMap) -> bool {
    text(request, &header::ACCEPT_ENCODING).is_some_and(|codings| {
        codings.split(',').any(|coding| {
            let mut parts = coding.split(';').map(str::trim);
            let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("zstd"));
            named && !parts.any(|part| matches!(part, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
        })
    })
}

/// A range that begins behind the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unsatisfiable;

/// The single byte range asked for. Several ranges, other units and nonsense mean the whole, as
/// RFC 9110 (14.2) allows.
fn range_of(request: &HeaderMap, tag: &str, size: u64) -> Option<Result<Range<u64>, Unsatisfiable>> {
    if let Some(condition) = text(request, &header::IF_RANGE)
        && condition.trim_matches('"') != tag
    {
        return None;
    }
    let (first, last) = text(request, &header::RANGE)?.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = (first.trim(), last.trim());
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), Ok(last)) if first <= last => first..last.saturating_add(1).min(size),
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(suffix)) if first.is_empty() => {
            if suffix == 0 {
                return Some(Err(Unsatisfiable));
            }
            size.saturating_sub(suffix)..size
        }
        _ => return None,
    };
    Some(if range.start < range.end { Ok(range) } else { Err(Unsatisfiable) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_range(value: &str, expect: Option<Result<Range<u64>, Unsatisfiable>>) {
        let mut headers = HeaderMap::new();
        headers.insert(header::RANGE, value.parse().unwrap());
        assert_eq!(range_of(&headers, "tag", 100), expect, "{value}");
    }

    #[test]
    fn ranges() {
        check_range("bytes=0-9", Some(Ok(0..10)));
        check_range("bytes=90-", Some(Ok(90..100)));
        check_range("bytes=90-1000", Some(Ok(90..100)));
        check_range("bytes=-5", Some(Ok(95..100)));
        check_range("bytes=-500", Some(Ok(0..100)));
        check_range("bytes=99-18446744073709551615", Some(Ok(99..100)));
        check_range("bytes=100-", Some(Err(Unsatisfiable)));
        check_range("bytes=-0", Some(Err(Unsatisfiable)));
        check_range("bytes=9-3", None);
        check_range("bytes=0-1,5-6", None);
        check_range("bytes=x-", None);
        check_range("lines=0-1", None);
    }

    #[test]
    fn zstd_is_sent_only_when_accepted() {
        for (value, expect) in [
            ("gzip, zstd", true),
            ("ZSTD", true),
            ("zstd;q=0", false),
            ("gzip", false),
            ("*", false),
            ("xzstd", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT_ENCODING, value.parse().unwrap());
            assert_eq!(accepts_zstd(&headers), expect, "{value}");
        }
    }

    #[test]
    fn validators() {
        assert!(tag_matches("\"a\", W/\"tag\"", "tag"));
        assert!(tag_matches("\"tag-zstd\"", "tag"));
        assert!(tag_matches("*", "tag"));
        assert!(!tag_matches("\"tagx\"", "tag"));
    }
}
