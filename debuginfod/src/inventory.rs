//! `/api/v1/artefacts`, `/api/v1/labels`, `/api/v1/namespaces`: what is there, and what goes or stays by somebody's word.
//!
//! Users of symbol servers complain that they can neither see what is stored nor delete it (Azure's symbol server, for one). Whoever
//! may read may look; whoever may upload to a namespace labels images for it; only an administrator deletes, since
//! a token that leaked from a build must not cost what other builds stored.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use axum::http::HeaderMap;
use serde::Deserialize;
use windlass_schema::BuildId;
use windlass_schema::http::{
    ArtefactDetails, ArtefactKind, Deleted, DerivedDetails, ImageDetails, ImageList, ImageSummary,
    LabelDetails, LabelRequest, LabelResponse, MAX_CHANGED_LABELS, MAX_LABELLED_IMAGES, MAX_LISTED_ARTEFACTS,
    MAX_LISTED_IMAGES, NamespaceUsage,
};

use crate::access::Identity;
use crate::catalog::{
    Artefact, Catalog, CatalogError, Image, ImageQuery, Label, LabelChange, LabelOutcome, Removal,
};
use crate::error::ServiceError;
use crate::intake::receive_bytes;
use crate::namespace::Namespace;
use crate::service::{App, now_s};

/// Largest body of a change to labels in bytes: the most images, each with the longest ID.
const MAX_LABELS_BODY_BYTES: u64 = 140 * MAX_LABELLED_IMAGES as u64;
/// Images of a page, unless the query says.
const DEFAULT_PAGE: usize = 100;

fn malformed(error: impl std::fmt::Display) -> ServiceError {
    ServiceError::Malformed(error.to_string())
}

fn query<T>(parameters: Result<Query<T>, QueryRejection>, expected: &str) -> Result<T, ServiceError> {
    let Query(parameters) =
        parameters.map_err(|e| malformed(format_args!("{}, expected {expected}", e.body_text())))?;
    Ok(parameters)
}

/// Which page of which images.
#[derive(Debug, Deserialize)]
pub(crate) struct ListParameters {
    namespace: Option<String>,
    label: Option<String>,
    after: Option<BuildId>,
    limit: Option<usize>,
}

/// `GET /api/v1/artefacts[?namespace=NAME][&label=NAME=VALUE][&after=ID][&limit=N]`.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    parameters: Result<Query<ListParameters>, QueryRejection>,
) -> Result<Json<ImageList>, ServiceError> {
    let parameters = query(parameters, "namespace, label, after and limit")?;
    let namespace =
        parameters.namespace.as_deref().map(str::parse::<Namespace>).transpose().map_err(malformed)?;
    let label = parameters.label.as_deref().map(str::parse::<Label>).transpose().map_err(malformed)?;
    let (asked, after) = (ImageQuery { namespace, label }, parameters.after);
    let limit = parameters.limit.unwrap_or(DEFAULT_PAGE).clamp(1, MAX_LISTED_IMAGES);
    let page = move |catalog: &dyn Catalog| {
        let page = catalog.images(&asked, after, limit)?;
        let images = page.images.into_iter().map(|image| summary(catalog, image));
        Ok(ImageList { images: images.collect::<Result<_, _>>()?, next: page.next })
    };
    Ok(Json(app.catalog(page).await?))
}

fn summary(catalog: &dyn Catalog, image: Image) -> Result<ImageSummary, CatalogError> {
    let Image { build_id, namespace, file_name, artefacts, bytes, stored_s, used_s } = image;
    let mut labels: Vec<_> =
        catalog.labels(build_id)?.into_iter().map(|labelled| labelled.label.to_string()).collect();
    labels.sort_unstable();
    labels.dedup();
    let namespace = namespace.to_string();
    Ok(ImageSummary { build_id, namespace, file_name, artefacts, bytes, stored_s, used_s, labels })
}

/// `GET /api/v1/artefacts/ID`.
pub(crate) async fn show(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<ImageDetails>, ServiceError> {
    let id: BuildId = id.parse()?;
    let found = move |catalog: &dyn Catalog| {
        let artefacts = catalog.artefacts(id, MAX_LISTED_ARTEFACTS + 1)?;
        Ok((artefacts, catalog.labels(id)?, catalog.derived_of(id)?))
    };
    let (artefacts, labels, derived) = app.catalog(found).await?;
    if artefacts.is_empty() {
        return Err(ServiceError::NotFound(format!("nothing is stored of {id}")));
    }
    let complete = artefacts.len() <= MAX_LISTED_ARTEFACTS;
    let labels = labels.into_iter().map(|labelled| LabelDetails {
        label: labelled.label.to_string(),
        namespace: labelled.namespace.to_string(),
        since_s: labelled.since_s,
    });
    let derived = derived.into_iter().map(|(key, blob)| DerivedDetails {
        kind: key.kind.as_str().to_owned(),
        version: key.version,
        size_bytes: blob.size,
    });
    Ok(Json(ImageDetails {
        build_id: id,
        artefacts: artefacts.into_iter().take(MAX_LISTED_ARTEFACTS).map(details).collect(),
        complete,
        labels: labels.collect(),
        derived: derived.collect(),
    }))
}

fn details(artefact: Artefact) -> ArtefactDetails {
    ArtefactDetails {
        kind: artefact.kind,
        path: artefact.path,
        namespace: artefact.namespace.to_string(),
        sha256: artefact.blob.hash.to_string(),
        size_bytes: artefact.blob.size,
        stored_bytes: artefact.blob.stored_size,
        file_name: artefact.file_name,
        stored_s: artefact.stored_s,
        used_s: artefact.used_s,
        brings: artefact.facts.brings(),
        unwind: artefact.facts.unwind,
        code: artefact.facts.code,
        damaged: artefact.damaged,
    }
}

/// What is to go.
#[derive(Debug, Deserialize)]
pub(crate) struct DeleteParameters {
    namespace: Option<String>,
    kind: Option<String>,
    path: Option<String>,
}

/// `DELETE /api/v1/artefacts/ID[?namespace=NAME][&kind=KIND][&path=PATH]`: of the namespace, else of the most trusted one.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
    parameters: Result<Query<DeleteParameters>, QueryRejection>,
) -> Result<Json<Deleted>, ServiceError> {
    let build_id: BuildId = id.parse()?;
    let parameters = query(parameters, "namespace, kind and path")?;
    let namespace = match &parameters.namespace {
        Some(name) => name.parse::<Namespace>().map_err(malformed)?,
        None => app.namespaces.first().clone(),
    };
    let removal = Removal {
        build_id,
        namespace: namespace.clone(),
        kind: parameters.kind.as_deref().map(str::parse::<ArtefactKind>).transpose()?,
        path: parameters.path,
        unless_used_since_s: None,
        at_s: now_s(),
        why: "deleted".to_owned(),
    };
    let writer = identity.writer;
    let remove = move |catalog: &dyn Catalog| {
        let removed = catalog.remove(&removal, &writer)?;
        let left = if removed.artefacts == 0 {
            catalog.artefacts(build_id, MAX_LISTED_ARTEFACTS)?
        } else {
            Vec::new()
        };
        Ok((removed, left))
    };
    let outcome = app.catalog(remove).await;
    app.forget(build_id);
    let (removed, left) = outcome?;
    if removed.artefacts == 0 {
        let mut others: Vec<_> = left.iter().map(|artefact| artefact.namespace.as_str()).collect();
        others.sort_unstable();
        others.dedup();
        let elsewhere = match others.is_empty() {
            true => String::new(),
            false => format!("; of the image something is stored in {}", others.join(", ")),
        };
        return Err(ServiceError::NotFound(format!(
            "nothing like that is stored of {build_id} in namespace {namespace}{elsewhere}"
        )));
    }
    Ok(Json(Deleted { artefacts: removed.artefacts, bytes: removed.bytes }))
}

/// `POST /api/v1/labels`: gives labels to images and takes them, for a namespace that the sender may upload to.
pub(crate) async fn label(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<LabelResponse>, ServiceError> {
    let namespace = identity.namespace(&headers, &app.namespaces)?;
    let mut body = body.into_data_stream();
    let received = receive_bytes(&headers, &mut body, MAX_LABELS_BODY_BYTES).await?;
    let request: LabelRequest =
        serde_json::from_slice(&received.sink).map_err(|e| malformed(format_args!("request: {e}")))?;
    let LabelRequest { build_ids, add, remove } = request;
    if build_ids.len() > MAX_LABELLED_IMAGES || add.len() + remove.len() > MAX_CHANGED_LABELS {
        return Err(malformed(format_args!(
            "{} images and {} labels in one request, at most {MAX_LABELLED_IMAGES} and {MAX_CHANGED_LABELS} are allowed",
            build_ids.len(),
            add.len() + remove.len()
        )));
    }
    let parsed = |labels: Vec<String>| {
        let labels = labels.iter().map(|label| label.parse::<Label>().map_err(malformed));
        labels.collect::<Result<Vec<_>, _>>()
    };
    let change = LabelChange { namespace, add: parsed(add)?, remove: parsed(remove)?, at_s: now_s() };
    let ids = build_ids.clone();
    let outcomes = app.catalog(move |catalog| catalog.change_labels(&ids, &change, &identity.writer)).await?;
    let mut response = LabelResponse::default();
    for (id, outcome) in build_ids.into_iter().zip(outcomes) {
        match outcome {
            LabelOutcome::Changed => response.changed += 1,
            LabelOutcome::Unchanged => response.unchanged += 1,
            LabelOutcome::Unknown => response.unknown.push(id),
            LabelOutcome::TooMany => response.too_many.push(id),
        }
    }
    Ok(Json(response))
}

/// `GET /api/v1/namespaces`: what each takes, and may take.
pub(crate) async fn namespaces(
    State(app): State<Arc<App>>,
) -> Result<Json<Vec<NamespaceUsage>>, ServiceError> {
    let usage = app.catalog(|catalog| catalog.usage()).await?.into_iter();
    let usage = usage.map(|usage| NamespaceUsage {
        quota_bytes: app.quotas.of(&usage.namespace),
        namespace: usage.namespace.to_string(),
        artefacts: usage.artefacts,
        bytes: usage.bytes,
        unfinished_bytes: usage.unfinished_bytes,
    });
    Ok(Json(usage.collect()))
}
