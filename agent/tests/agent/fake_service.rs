//! A service that keeps what it is sent, and notes every request with its answer.

use std::collections::{HashMap, VecDeque};
use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use windlass_schema::BuildId;
use windlass_schema::http::{ErrorBody, MissingRequest, MissingResponse, SHA256_HEADER};
use windlass_schema::table::{HEADER_BYTES, MAGIC, VERSION, checksum};

/// How the service answers for tables.
#[derive(Clone, Copy)]
pub(crate) enum Tables {
    /// Unknown; made once a skeleton was sent, after one answer that it is being made.
    FromSkeletons,
    /// 422 with this reason.
    Refused(&'static str),
    /// 500, always.
    Failing,
    /// What this makes of the image's table.
    Changed(fn(Vec<u8>) -> Vec<u8>),
    /// A table with this many rows in its header, under a tag that names the number: 304 to whoever names that.
    Tagged,
    /// Nothing, ever, though the connection stands.
    Silent,
    /// The connection ends within the table, always.
    CutOff,
}

/// A sample that arrived.
pub(crate) struct ShippedSample {
    pub(crate) tid: u32,
    pub(crate) stop: String,
    /// `ADDRESS@BUILD-ID`.
    pub(crate) frames: Vec<String>,
    /// `KEY=VALUE` of its resource.
    pub(crate) resource: Vec<String>,
    /// CPU number.
    pub(crate) cpu: u32,
}

struct Shared {
    tables: Tables,
    requests: Mutex<Vec<String>>,
    artefacts: Mutex<HashMap<String, Vec<u8>>>,
    profiles: Mutex<Vec<ExportProfilesServiceRequest>>,
    /// Each request with profiles takes one from here before it is answered, and gives it back.
    turns: Semaphore,
    /// What the next of them are answered; then 200.
    answers: Mutex<VecDeque<StatusCode>>,
    /// Profiles with a sample of this thread are answered so, and are not kept.
    disliked: Mutex<Option<(u32, StatusCode)>>,
    /// The only token with which profiles are taken.
    token: Mutex<Option<String>>,
    /// What artefacts of a build-ID are answered, and are not kept.
    refused: Mutex<HashMap<String, StatusCode>>,
    /// What the header of [`Tables::Tagged`] says.
    rows: AtomicU32,
    /// What becomes of them on their way.
    damage: Mutex<fn(Vec<u8>) -> Vec<u8>>,
}

type Service = State<Arc<Shared>>;

/// The service at work, or an address where none is yet.
pub(crate) struct FakeService {
    address: SocketAddr,
    shared: Arc<Shared>,
    _runtime: Option<tokio::runtime::Runtime>,
}

impl FakeService {
    /// An address where nobody answers yet.
    pub(crate) fn reserve() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let shared = shared(Tables::FromSkeletons);
        Self { address: listener.local_addr().unwrap(), shared, _runtime: None }
    }

    pub(crate) fn start(tables: Tables) -> Self {
        Self::reserve().open(tables)
    }

    /// Starts to answer.
    pub(crate) fn open(self, tables: Tables) -> Self {
        let shared = shared(tables);
        let app = Router::new()
            .route("/api/v1/buildid/{id}/unwind", get(unwind))
            .route("/api/v1/buildid/{id}/{kind}", put(store))
            .route("/api/v1/missing", post(missing))
            .route("/v1development/profiles", post(profiles))
            .layer(DefaultBodyLimit::disable())
            .with_state(shared.clone());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind(self.address)).unwrap();
        runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address: self.address, shared, _runtime: Some(runtime) }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `METHOD ID WHAT STATUS` of each request, in order.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// What was stored as `ID KIND`.
    pub(crate) fn artefact(&self, name: &str) -> Option<Vec<u8>> {
        self.shared.artefacts.lock().unwrap().get(name).cloned()
    }

    /// From now on nothing is answered to profiles.
    pub(crate) fn hold(&self) {
        self.shared.turns.forget_permits(1);
    }

    /// Profiles are answered again.
    pub(crate) fn release(&self) {
        self.shared.turns.add_permits(1);
    }

    /// The next requests with profiles are answered so, and are not kept.
    pub(crate) fn answer_profiles(&self, statuses: &[u16]) {
        let statuses = statuses.iter().map(|status| StatusCode::from_u16(*status).unwrap());
        self.shared.answers.lock().unwrap().extend(statuses);
    }

    /// From now on profiles with a sample of this thread are answered so.
    pub(crate) fn answer_thread(&self, tid: u32, status: u16) {
        let status = StatusCode::from_u16(status).unwrap();
        *self.shared.disliked.lock().unwrap() = Some((tid, status));
    }

    /// From now on profiles are taken with this token alone.
    pub(crate) fn demand_token(&self, token: &str) {
        *self.shared.token.lock().unwrap() = Some(token.to_owned());
    }

    /// From now on artefacts of this build-ID are answered so; 201 stores them.
    pub(crate) fn answer_artefacts(&self, id: &str, status: u16) {
        let status = StatusCode::from_u16(status).unwrap();
        self.shared.refused.lock().unwrap().insert(id.to_owned(), status);
    }

    /// From now on [`Tables::Tagged`] are others, and this becomes of them on their way.
    pub(crate) fn change_tables(&self, rows: u32, damage: fn(Vec<u8>) -> Vec<u8>) {
        *self.shared.damage.lock().unwrap() = damage;
        self.shared.rows.store(rows, Ordering::SeqCst);
    }

    /// The samples that arrived, in order.
    pub(crate) fn samples(&self) -> Vec<ShippedSample> {
        self.shared.profiles.lock().unwrap().iter().flat_map(samples_of).collect()
    }
}

fn shared(tables: Tables) -> Arc<Shared> {
    Arc::new(Shared {
        tables,
        requests: Mutex::default(),
        artefacts: Mutex::default(),
        profiles: Mutex::default(),
        turns: Semaphore::new(1),
        answers: Mutex::default(),
        disliked: Mutex::default(),
        token: Mutex::default(),
        refused: Mutex::default(),
        rows: AtomicU32::new(0),
        damage: Mutex::new(|table| table),
    })
}

impl Shared {
    fn note(&self, request: String, status: StatusCode) -> StatusCode {
        self.requests.lock().unwrap().push(format!("{request} {}", status.as_u16()));
        status
    }
}

async fn unwind(State(shared): Service, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let request = format!("GET {id} unwind");
    let table = |id: &str| table_of(id.parse().unwrap());
    match shared.tables {
        Tables::Refused(reason) => {
            let body = ErrorBody { error: reason.to_owned() };
            (shared.note(request, StatusCode::UNPROCESSABLE_ENTITY), axum::Json(body)).into_response()
        }
        Tables::Failing => {
            let body = ErrorBody { error: "disk on fire".to_owned() };
            (shared.note(request, StatusCode::INTERNAL_SERVER_ERROR), axum::Json(body)).into_response()
        }
        Tables::Changed(change) => (shared.note(request, StatusCode::OK), change(table(&id))).into_response(),
        Tables::Tagged => {
            let rows = shared.rows.load(Ordering::SeqCst);
            let tag = format!("\"rows-{rows}\"");
            if headers.get("if-none-match").is_some_and(|known| *known == *tag) {
                return shared.note(request, StatusCode::NOT_MODIFIED).into_response();
            }
            let damage = *shared.damage.lock().unwrap();
            let sent = damage(table_with(id.parse().unwrap(), rows));
            (shared.note(request, StatusCode::OK), [("etag", tag)], sent).into_response()
        }
        Tables::Silent => {
            shared.note(request, StatusCode::CONTINUE);
            std::future::pending().await
        }
        Tables::CutOff => {
            let table = table(&id);
            let length = [("content-length", table.len().to_string())];
            let part = Bytes::copy_from_slice(&table[..table.len() / 2]);
            (shared.note(request, StatusCode::OK), length, Body::new(Half(Some(part)))).into_response()
        }
        Tables::FromSkeletons
            if !shared.artefacts.lock().unwrap().contains_key(&format!("{id} skeleton")) =>
        {
            error(shared.note(request, StatusCode::NOT_FOUND))
        }
        Tables::FromSkeletons => {
            let making = format!("{request} 202");
            if shared.requests.lock().unwrap().contains(&making) {
                return (shared.note(request, StatusCode::OK), table(&id)).into_response();
            }
            (shared.note(request, StatusCode::ACCEPTED), [("retry-after", "1")]).into_response()
        }
    }
}

/// A body of one part, which may be less than its length was said to be.
struct Half(Option<Bytes>);

impl hyper::body::Body for Half {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
        std::task::Poll::Ready(self.0.take().map(|part| Ok(hyper::body::Frame::data(part))))
    }
}

async fn store(
    State(shared): Service,
    Path((id, kind)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let request = format!("PUT {id} {kind}");
    assert_eq!(headers["content-encoding"], "zstd");
    let content = zstd::decode_all(&body[..]).unwrap();
    let sha256: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    if headers[SHA256_HEADER] != sha256 {
        return error(shared.note(request, StatusCode::UNPROCESSABLE_ENTITY));
    }
    let refused = shared.refused.lock().unwrap().get(&id).copied();
    if let Some(status) = refused.filter(|status| *status != StatusCode::CREATED) {
        return error(shared.note(request, status));
    }
    if kind == "skeleton" {
        let image = windlass_agent::image::identify(&content[..]).unwrap();
        if image.id.build_id().to_string() != id {
            return error(shared.note(request, StatusCode::UNPROCESSABLE_ENTITY));
        }
    }
    shared.artefacts.lock().unwrap().insert(format!("{id} {kind}"), content);
    shared.note(request, StatusCode::CREATED).into_response()
}

/// As the service says it.
fn error(status: StatusCode) -> Response {
    (status, axum::Json(ErrorBody { error: "as the test wants it".to_owned() })).into_response()
}

async fn missing(
    State(shared): Service,
    axum::Json(request): axum::Json<MissingRequest>,
) -> axum::Json<MissingResponse> {
    let artefacts = shared.artefacts.lock().unwrap();
    let missing = request
        .artefacts
        .into_iter()
        .filter(|name| !artefacts.contains_key(&format!("{} {}", name.build_id, name.kind)))
        .collect();
    axum::Json(MissingResponse { missing, differing: Vec::new() })
}

async fn profiles(State(shared): Service, headers: HeaderMap, body: Bytes) -> Response {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    let coding = headers["content-encoding"].to_str().unwrap();
    let mut bytes = Vec::new();
    match coding {
        "zstd" => bytes = zstd::decode_all(&body[..]).unwrap(),
        "gzip" => drop(flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut bytes).unwrap()),
        other => panic!("{other}"),
    }
    let _turn = shared.turns.acquire().await.unwrap();
    let demanded = shared.token.lock().unwrap().as_ref().map(|token| format!("Bearer {token}"));
    if demanded.is_some_and(|token| headers.get("authorization").is_none_or(|shown| *shown != *token)) {
        return error(shared.note(format!("POST profiles {coding}"), StatusCode::UNAUTHORIZED));
    }
    if let Some(status) = shared.answers.lock().unwrap().pop_front() {
        return error(shared.note(format!("POST profiles {coding}"), status));
    }
    let request = ExportProfilesServiceRequest::decode(&bytes[..]).unwrap();
    let disliked = *shared.disliked.lock().unwrap();
    if let Some((tid, status)) = disliked
        && samples_of(&request).iter().any(|sample| sample.tid == tid)
    {
        return error(shared.note(format!("POST profiles {coding}"), status));
    }
    shared.profiles.lock().unwrap().push(request);
    shared.note(format!("POST profiles {coding}"), StatusCode::OK).into_response()
}

fn samples_of(request: &ExportProfilesServiceRequest) -> Vec<ShippedSample> {
    let dictionary = request.dictionary.as_ref().unwrap();
    let attribute = |indices: &[i32], key: &str| {
        indices.iter().find_map(|index| {
            let attribute = &dictionary.attribute_table[*index as usize];
            if dictionary.string_table[attribute.key_strindex as usize] != key {
                return None;
            }
            Some(match attribute.value.as_ref()?.value.as_ref()? {
                Value::StringValue(text) => text.clone(),
                Value::IntValue(number) => number.to_string(),
                other => panic!("{other:?}"),
            })
        })
    };
    let frame = |index: &i32| {
        let location = &dictionary.location_table[*index as usize];
        let mapping = &dictionary.mapping_table[location.mapping_index as usize];
        let id = attribute(&mapping.attribute_indices, "process.executable.build_id.gnu")
            .or_else(|| attribute(&mapping.attribute_indices, "process.executable.build_id.htlhash"));
        format!("{:#x}@{}", location.address, id.unwrap_or_default())
    };
    let mut samples = Vec::new();
    for profiles in &request.resource_profiles {
        let resource: Vec<String> = (profiles.resource.as_ref().unwrap().attributes.iter())
            .map(|attribute| match attribute.value.as_ref().unwrap().value.as_ref().unwrap() {
                Value::StringValue(text) => format!("{}={text}", attribute.key),
                other => panic!("{other:?}"),
            })
            .collect();
        let number =
            |indices: &[i32], key: &str| attribute(indices, key).unwrap().parse().expect("a number's text");
        samples.extend(profiles.scope_profiles[0].profiles[0].samples.iter().map(|sample| {
            ShippedSample {
                tid: number(&sample.attribute_indices, "thread.id"),
                cpu: number(&sample.attribute_indices, "cpu.logical_number"),
                stop: attribute(&sample.attribute_indices, "windlass.stop_reason").unwrap(),
                frames: dictionary.stack_table[sample.stack_index as usize]
                    .location_indices
                    .iter()
                    .map(frame)
                    .collect(),
                resource: resource.clone(),
            }
        }));
    }
    samples
}

/// A table of `id` without a row.
pub(crate) fn table_of(id: BuildId) -> Vec<u8> {
    table_with(id, 0)
}

/// One that says that it has `rows` rows, of which no lookup takes note.
pub(crate) fn table_with(id: BuildId, rows: u32) -> Vec<u8> {
    let mut file = vec![0; HEADER_BYTES];
    file[..4].copy_from_slice(&MAGIC);
    file[4..6].copy_from_slice(&VERSION.to_le_bytes());
    file[6] = windlass_agent::table_cache::HOST_ARCHITECTURE as u8;
    file[36..40].copy_from_slice(&rows.to_le_bytes());
    file[40] = id.as_bytes().len() as u8;
    file[41..41 + id.as_bytes().len()].copy_from_slice(id.as_bytes());
    let sum = checksum(&file);
    file[8..16].copy_from_slice(&sum.to_le_bytes());
    file
}
