//! Who may do what: the one place that every route asks.
//!
//! elfutils' server leaves this to a proxy in front of it. Here a service that others can reach lets nobody write
//! without a token, whatever it was started with:
//!
//! | needs a token | when |
//! |---|---|
//! | a write | the address is no loopback address, or there is a token (of the catalog or of `--token-file`), or `--private` |
//! | a read | `--private` |
//! | `/healthz`, `/readyz`, `/api/v1/openapi.json` | never |
//!
//! A token is good for the scopes that it has (401: no token or a wrong one; 403: not for this). Whoever needs no token is
//! `anonymous` and may do all. Replicas ask the catalog for a token at most every [`VERIFIED_TTL`], so that
//! is how long one may still be accepted after it was revoked, and how long a service on loopback may take to see that there
//! is a first token.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use windlass_schema::http::NAMESPACE_HEADER;

use crate::catalog::Writer;
use crate::config::Config;
use crate::connection::Peer;
use crate::content_hash::ContentHash;
use crate::error::{ServiceError, reset};
use crate::intake::drain;
use crate::namespace::{Namespace, Namespaces};
use crate::service::{App, now_s};
use crate::token::{ANONYMOUS, Scope, TOKEN_FILE, Token};
use crate::upstream::FORWARDED_FOR;

/// For how long what the catalog says of a token is believed.
pub(crate) const VERIFIED_TTL: Duration = Duration::from_secs(5);
/// Most tokens believed; at the limit all are asked for again.
const MAX_VERIFIED: usize = 10_000;
/// How exactly the last use of a token is known, in seconds: so seldom does a use cost a write.
const USE_INTERVAL_S: u64 = 3600;

/// What a route asks of whoever calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// To read.
    Read,
    /// To read, or to know what an upload may spare.
    Compare,
    /// To write to a namespace. Which one is for the handler to check: [`Identity::namespace`].
    Upload,
    /// To see what others did.
    Admin,
}

/// Who calls. An extension of every request that needs more than [`Need::Read`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    scopes: Vec<Scope>,
    /// Its name and address.
    pub(crate) writer: Writer,
}

impl Identity {
    fn is_admin(&self) -> bool {
        self.scopes.contains(&Scope::Admin)
    }

    fn uploads_to(&self) -> Vec<&Namespace> {
        let scopes = self.scopes.iter();
        scopes
            .filter_map(|scope| match scope {
                Scope::Upload(namespace) => Some(namespace),
                Scope::Read | Scope::Admin => None,
            })
            .collect()
    }

    fn refuse(&self, needed: &str) -> ServiceError {
        let scopes: Vec<_> = self.scopes.iter().map(ToString::to_string).collect();
        ServiceError::Forbidden {
            needed: needed.to_owned(),
            token: self.writer.token.clone(),
            scopes: if scopes.is_empty() { "none".to_owned() } else { scopes.join(", ") },
        }
    }

    fn check(&self, need: Need) -> Result<(), ServiceError> {
        let reads = self.scopes.contains(&Scope::Read);
        let uploads = !self.uploads_to().is_empty();
        match need {
            _ if self.is_admin() => Ok(()),
            Need::Read if !reads => Err(self.refuse("read")),
            Need::Compare if !reads && !uploads => Err(self.refuse("read or upload:NAMESPACE")),
            Need::Upload if !uploads => Err(self.refuse("upload:NAMESPACE")),
            Need::Admin => Err(self.refuse("admin")),
            Need::Read | Need::Compare | Need::Upload => Ok(()),
        }
    }

    /// Where an upload with these headers goes: where it says, else the only place it may go to, else, for who may choose,
    /// the first in the order of trust.
    pub(crate) fn namespace(
        &self,
        headers: &HeaderMap,
        order: &Namespaces,
    ) -> Result<Namespace, ServiceError> {
        let allowed = self.uploads_to();
        let Some(stated) = headers.get(NAMESPACE_HEADER) else {
            return match (&allowed[..], self.is_admin()) {
                (_, true) => Ok(order.first().clone()),
                ([only], false) => Ok((*only).clone()),
                ([], false) => Err(self.refuse("upload:NAMESPACE")),
                (several, false) => {
                    let names: Vec<_> = several.iter().map(|namespace| namespace.as_str()).collect();
                    Err(ServiceError::Malformed(format!(
                        "the token is good for the namespaces {}: name one by the header {NAMESPACE_HEADER}",
                        names.join(", ")
                    )))
                }
            };
        };
        let stated = Namespace::for_uploads(&String::from_utf8_lossy(stated.as_bytes()))
            .map_err(|e| ServiceError::Malformed(format!("header {NAMESPACE_HEADER}: {e}")))?;
        match self.is_admin() || allowed.contains(&&stated) {
            true => Ok(stated),
            false => Err(self.refuse(&Scope::Upload(stated).to_string())),
        }
    }

    /// The namespace whose uploads would be compared, or `None` for who only reads, and gets the most trusted of all.
    pub(crate) fn compared_namespace(
        &self,
        headers: &HeaderMap,
        order: &Namespaces,
    ) -> Result<Option<Namespace>, ServiceError> {
        match self.is_admin() || !self.uploads_to().is_empty() {
            true => self.namespace(headers, order).map(Some),
            false => Ok(None),
        }
    }
}

/// The rules, and what is known of tokens. No secret is kept, only hashes.
pub(crate) struct Access {
    token_file: Option<ContentHash>,
    private: bool,
    trust_forwarded_for: bool,
    /// Whether a write needs a token. Once it does, it stays so.
    closed: AtomicBool,
    /// When the catalog was last asked whether it has tokens.
    asked: Mutex<Instant>,
    verified: Mutex<HashMap<ContentHash, (Instant, Arc<Token>)>>,
}

impl Access {
    /// `has_tokens`: whether the catalog has any.
    pub(crate) fn new(config: &Config, has_tokens: bool) -> Self {
        let is_reachable = !config.listen.ip().is_loopback();
        let closed = is_reachable || config.private || config.token.is_some() || has_tokens;
        Self {
            token_file: config.token.as_deref().map(|token| ContentHash::of(token.trim().as_bytes())),
            private: config.private,
            trust_forwarded_for: config.trust_forwarded_for,
            closed: AtomicBool::new(closed),
            asked: Mutex::new(Instant::now()),
            verified: Mutex::default(),
        }
    }

    async fn is_closed(&self, app: &App) -> Result<bool, ServiceError> {
        if self.closed.load(Ordering::Relaxed) {
            return Ok(true);
        }
        if self.asked.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < VERIFIED_TTL {
            return Ok(false);
        }
        let has_tokens = app.catalog(|catalog| Ok(!catalog.tokens()?.is_empty())).await?;
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.closed.fetch_or(has_tokens, Ordering::Relaxed);
        Ok(has_tokens)
    }

    fn is_token_file(&self, secret: ContentHash) -> bool {
        // Every byte of the hashes is compared, so the time taken says nothing about the token. With the catalog's the time of
        // a lookup may tell of the hash, from which nobody gets to the token.
        let differing = |expected: &ContentHash| {
            expected.as_bytes().iter().zip(secret.as_bytes()).fold(0, |bits, (a, b)| bits | (a ^ b))
        };
        self.token_file.as_ref().map(differing) == Some(0)
    }

    /// The token of this secret, as the catalog had it at most [`VERIFIED_TTL`] ago. One that is not there is looked for each
    /// time, so that a new one works at once.
    async fn token(&self, app: &App, secret: ContentHash) -> Result<Option<Arc<Token>>, ServiceError> {
        let known = self.verified.lock().unwrap_or_else(PoisonError::into_inner).get(&secret).cloned();
        if let Some((since, token)) = known
            && since.elapsed() < VERIFIED_TTL
        {
            return Ok(Some(token));
        }
        let asked = Instant::now();
        let found = app.catalog(move |catalog| catalog.token(secret)).await?;
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(token) = found.map(Arc::new) else {
            verified.remove(&secret);
            return Ok(None);
        };
        if verified.len() >= MAX_VERIFIED {
            verified.clear();
        }
        verified.insert(secret, (asked, Arc::clone(&token)));
        Ok(Some(token))
    }
}

/// Records a use of the token if the last one on record is long ago. Nobody waits for that.
fn note_use(app: &Arc<App>, secret: ContentHash, token: &Token) {
    let now_s = now_s();
    let since_s = now_s.saturating_sub(USE_INTERVAL_S);
    if token.last_used_s.is_some_and(|used_s| used_s >= since_s) {
        return;
    }
    let app = Arc::clone(app);
    tokio::spawn(async move {
        if let Err(error) = app.catalog(move |catalog| catalog.use_token(secret, now_s, since_s)).await {
            tracing::warn!("recording the use of a token: {error}");
        }
    });
}

fn secret(headers: &HeaderMap) -> Option<ContentHash> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes().strip_prefix(b"Bearer ")?;
    Some(ContentHash::of(value.trim_ascii()))
}

/// Who sends these headers from `peer`.
async fn identify(app: &Arc<App>, headers: &HeaderMap, peer: String) -> Result<Identity, ServiceError> {
    let named = |name: &str, scopes| Identity { scopes, writer: Writer { token: name.to_owned(), peer } };
    let secret = secret(headers);
    if secret.is_some_and(|secret| app.access.is_token_file(secret)) {
        return Ok(named(TOKEN_FILE, vec![Scope::Admin]));
    }
    if let Some(secret) = secret
        && let Some(token) = app.access.token(app, secret).await?
    {
        if let Some(why) = token.refusal(now_s()) {
            return Err(ServiceError::EndedToken { token: token.name.clone(), why });
        }
        note_use(app, secret, &token);
        return Ok(named(&token.name, token.scopes.clone()));
    }
    match app.access.is_closed(app).await? {
        true => Err(ServiceError::Unauthorized),
        false => Ok(named(ANONYMOUS, vec![Scope::Admin])),
    }
}

/// The address of the client: of the connection or, where a proxy is trusted to say, what the last one added.
fn client_address(access: &Access, request: &Parts) -> String {
    let forwarded = request.headers.get_all(&FORWARDED_FOR).iter().next_back();
    let forwarded = forwarded.filter(|_| access.trust_forwarded_for).and_then(|value| value.to_str().ok());
    let forwarded = forwarded.and_then(|hops| hops.rsplit(',').next()?.trim().parse().ok());
    let connected = || request.extensions.get::<Peer>().map(|Peer(address)| address.ip());
    forwarded.or_else(connected).map_or_else(String::new, |address: std::net::IpAddr| address.to_string())
}

async fn admit(app: &Arc<App>, need: Need, request: &Parts) -> Result<Option<Identity>, ServiceError> {
    if !app.access.private && need == Need::Read {
        return Ok(None);
    }
    let peer = client_address(&app.access, request);
    if !app.access.private {
        match need {
            Need::Compare if !request.headers.contains_key(header::AUTHORIZATION) => {
                // Who may upload without a token compares as an uploader, everyone else as a reader.
                let reader = Identity {
                    scopes: vec![Scope::Read],
                    writer: Writer { token: ANONYMOUS.to_owned(), peer },
                };
                return match app.access.is_closed(app).await? {
                    true => Ok(Some(reader)),
                    false => Ok(Some(Identity { scopes: vec![Scope::Admin], ..reader })),
                };
            }
            Need::Read | Need::Compare | Need::Upload | Need::Admin => {}
        }
    }
    let identity = identify(app, &request.headers, peer).await?;
    identity.check(need)?;
    Ok(Some(identity))
}

/// In front of the routes that need something: lets requests through, or answers why not.
pub(crate) async fn require(
    State((app, need)): State<(Arc<App>, Need)>,
    request: Request,
    next: Next,
) -> Response {
    let (mut parts, body) = request.into_parts();
    match admit(&app, need, &parts).await {
        Ok(identity) => {
            if let Some(identity) = identity {
                parts.extensions.insert(identity);
            }
            next.run(Request::from_parts(parts, body)).await
        }
        Err(error) => {
            tracing::warn!("{} {}: {error}", parts.method, parts.uri.path());
            drain(body.into_data_stream()).await;
            // A debuginfod client must not take trouble of ours for "does not exist".
            let is_interface = parts.uri.path().starts_with("/api/");
            if need == Need::Read && !is_interface && error.status().is_server_error() {
                return reset();
            }
            error.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(scopes: &[&str]) -> Identity {
        let scopes = scopes.iter().map(|scope| scope.parse().unwrap()).collect();
        Identity { scopes, writer: Writer { token: "ci".to_owned(), peer: String::new() } }
    }

    #[test]
    fn a_scope_is_good_for_its_own_needs() {
        let cases: [(&[&str], [bool; 4]); 5] = [
            (&[], [false, false, false, false]),
            (&["read"], [true, true, false, false]),
            (&["upload:try"], [false, true, true, false]),
            (&["read", "upload:try"], [true, true, true, false]),
            (&["admin"], [true, true, true, true]),
        ];
        for (scopes, expect) in cases {
            let needs = [Need::Read, Need::Compare, Need::Upload, Need::Admin];
            assert_eq!(needs.map(|need| identity(scopes).check(need).is_ok()), expect, "{scopes:?}");
        }
        let refusal = identity(&["read", "upload:try"]).check(Need::Admin).unwrap_err();
        assert_eq!(refusal.status(), 403);
        let text = refusal.to_string();
        assert!(text.contains("scope admin") && text.contains("\"ci\" has read, upload:try"), "{text}");
    }

    #[test]
    fn an_upload_goes_where_its_token_lets_it() {
        let order = Namespaces::new(&["release".to_owned(), "main".to_owned()]).unwrap();
        let namespace = |scopes: &[&str], stated: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(stated) = stated {
                headers.insert(NAMESPACE_HEADER, stated.parse().unwrap());
            }
            let found = identity(scopes).namespace(&headers, &order);
            found.map(|namespace| namespace.to_string()).map_err(|error| error.status().as_u16())
        };
        let expect = |name: &str| Ok(name.to_owned());
        assert_eq!(namespace(&["admin"], None), expect("release"));
        assert_eq!(namespace(&["admin"], Some("other")), expect("other"));
        assert_eq!(namespace(&["upload:try"], None), expect("try"));
        assert_eq!(namespace(&["upload:try"], Some("try")), expect("try"));
        assert_eq!(namespace(&["upload:try"], Some("release")), Err(403));
        assert_eq!(namespace(&["read"], None), Err(403));
        assert_eq!(namespace(&["upload:try", "upload:main"], None), Err(400));
        assert_eq!(namespace(&["upload:try", "upload:main"], Some("main")), expect("main"));
        assert_eq!(namespace(&["admin"], Some("upstream")), Err(400));
        assert_eq!(namespace(&["admin"], Some("../x")), Err(400));
    }

    #[test]
    fn only_the_whole_token_opens() {
        let config = Config { token: Some("secret\n".to_owned()), ..Config::new("data".into()) };
        let access = Access::new(&config, false);
        for (value, expect) in [
            (Some("Bearer secret"), true),
            (Some("Bearer  secret "), true),
            (Some("Bearer secre"), false),
            (Some("Bearer "), false),
            (Some("secret"), false),
            (Some("Basic secret"), false),
            (None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            let opens = secret(&headers).is_some_and(|secret| access.is_token_file(secret));
            assert_eq!(opens, expect, "{value:?}");
        }
        let open = Access::new(&Config::new("data".into()), false);
        assert!(!open.is_token_file(ContentHash::of(b"")));
    }

    #[test]
    fn a_proxy_is_believed_only_when_told_to() {
        let (mut request, _) = Request::new(axum::body::Body::empty()).into_parts();
        let peer = Peer("192.0.2.1:5".parse().unwrap());
        request.extensions.insert(peer);
        request.headers.append(FORWARDED_FOR, "198.51.100.1".parse().unwrap());
        request.headers.append(FORWARDED_FOR, "203.0.113.9, 2001:db8::1".parse().unwrap());
        let mut config = Config::new("data".into());
        assert_eq!(client_address(&Access::new(&config, false), &request), "192.0.2.1");
        config.trust_forwarded_for = true;
        assert_eq!(
            client_address(&Access::new(&config, false), &request),
            "2001:db8::1",
            "the proxy's own word"
        );
        request.headers.append(FORWARDED_FOR, "nonsense".parse().unwrap());
        assert_eq!(client_address(&Access::new(&config, false), &request), "192.0.2.1");
    }
}
