//! `POST /api/v1/symbolize`: names for addresses.
//!
//! Other services answer one event or one address at a time and repeat every string in every frame. Here a request
//! is a batch over many images and the answer a dictionary: each file, function and frame once. A pprof profile goes
//! through the same lookup and comes back with its locations filled in.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use windlass_schema::http::{
    FrameLine, FunctionName, ImageAddresses, ImageFrames, MAX_SYMBOLIZE_ADDRESSES, SymbolizeRequest,
    SymbolizeResponse, Unresolved,
};
use windlass_schema::{ImageAddress, ReturnAddress};
use windlass_symbol_index::{Frame, Index};

use crate::error::ServiceError;
use crate::intake::receive_bytes;
use crate::profiles::{PPROF_TYPE, Unnamed, decode_pprof, encode_pprof, name_locations};
use crate::service::App;
use crate::symbols;

/// Largest request in bytes: the most addresses at 64 bytes each.
const MAX_BODY_BYTES: u64 = 64 * MAX_SYMBOLIZE_ADDRESSES as u64;

/// What a pprof profile counts as in the memory budget: a batch of this encoded size weighs more than the
/// largest profile that is decoded.
const PPROF_WEIGHT_BYTES: u64 = 4 << 20;

/// Symbolizes a [`SymbolizeRequest`] or a pprof profile, and answers in kind.
pub(crate) async fn symbolize(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ServiceError> {
    let mut body = body.into_data_stream();
    let content_type =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let content_type = content_type.split(';').next().unwrap_or_default().trim();
    let received = receive_bytes(&headers, &mut body, MAX_BODY_BYTES).await?.sink;
    match content_type {
        "application/json" => {
            let request = serde_json::from_slice(&received)
                .map_err(|e| ServiceError::Malformed(format!("request: {e}")))?;
            Ok(Json(resolve(&app, request).await?).into_response())
        }
        PPROF_TYPE | "application/x-protobuf" | "application/octet-stream" | "application/gzip" => {
            // Held until the answer is made.
            let _admission = app.decoding.admit(PPROF_WEIGHT_BYTES).await;
            let profile =
                tokio::task::spawn_blocking(move || decode_pprof(&received, MAX_BODY_BYTES)).await??;
            let named = name_locations(&app, profile, Unnamed::Leave).await?;
            let bytes = tokio::task::spawn_blocking(move || encode_pprof(&named)).await??;
            Ok(([(header::CONTENT_TYPE, PPROF_TYPE)], bytes).into_response())
        }
        other => Err(ServiceError::Malformed(format!(
            "Content-Type {other:?}, expected application/json or {PPROF_TYPE}"
        ))),
    }
}

/// Looks up all addresses of a request.
pub(crate) async fn resolve(
    app: &Arc<App>,
    request: SymbolizeRequest,
) -> Result<SymbolizeResponse, ServiceError> {
    let count: usize = request.images.iter().map(|image| image.addresses.len()).sum();
    if count > MAX_SYMBOLIZE_ADDRESSES {
        return Err(ServiceError::Malformed(format!(
            "{count} addresses in one request, at most {MAX_SYMBOLIZE_ADDRESSES} are allowed"
        )));
    }
    let mut dictionary = Dictionary::default();
    for image in request.images {
        let index = symbols::open(app, image.build_id).await?;
        dictionary = tokio::task::spawn_blocking(move || {
            dictionary.add_image(&image, index.as_ref().map(|open| open.get()).map_err(|why| *why));
            dictionary
        })
        .await?;
    }
    Ok(dictionary.response)
}

/// A response under construction, with what is in it already.
#[derive(Default)]
struct Dictionary {
    response: SymbolizeResponse,
    files: HashMap<String, u32>,
    functions: HashMap<FunctionName, u32>,
    frames: HashMap<FrameLine, u32>,
}

/// The number of `value` in `list`, where it is put if it is new.
fn intern<T: Clone + Eq + Hash>(list: &mut Vec<T>, known: &mut HashMap<T, u32>, value: T) -> u32 {
    if let Some(number) = known.get(&value) {
        return *number;
    }
    let number = list.len() as u32;
    list.push(value.clone());
    known.insert(value, number);
    number
}

impl Dictionary {
    fn add_image(&mut self, image: &ImageAddresses, index: Result<&Index<'_>, Unresolved>) {
        let mut answer = ImageFrames {
            build_id: image.build_id,
            addresses: Vec::with_capacity(image.addresses.len()),
            unresolved: Vec::new(),
            unnamed_functions: Vec::new(),
        };
        for (number, address) in image.addresses.iter().enumerate() {
            let address = match image.return_addresses {
                true => ReturnAddress::new(*address).lookup_address().get(),
                false => *address,
            };
            let address = ImageAddress::new(address);
            let found = index.and_then(|index| index.lookup(address));
            answer.addresses.push(match found {
                Ok(frames) => frames.into_iter().map(|frame| self.add_frame(frame)).collect(),
                Err(why) => {
                    answer.unresolved.push((number as u32, why));
                    let start = index.ok().and_then(|index| index.function_at(address));
                    answer.unnamed_functions.extend(start.map(|start| (number as u32, start.get())));
                    Vec::new()
                }
            });
        }
        self.response.images.push(answer);
    }

    fn add_frame(&mut self, frame: Frame<'_>) -> u32 {
        let response = &mut self.response;
        let function = FunctionName {
            name: frame.function.into_owned(),
            linkage_name: frame.linkage_name.map(|name| name.into_owned()),
            provenance: frame.provenance,
        };
        let line = FrameLine {
            function: intern(&mut response.functions, &mut self.functions, function),
            file: frame.file.map(|file| intern(&mut response.files, &mut self.files, file.into_owned())),
            line: frame.line,
        };
        intern(&mut response.frames, &mut self.frames, line)
    }
}
