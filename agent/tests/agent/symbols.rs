//! Names that only this host knows, on their way to a service that refuses some.

use std::sync::Arc;

use windlass_agent::metrics::Metrics;
use windlass_agent::service::Service;
use windlass_agent::symbol_upload::SymbolUpload;
use windlass_agent::token::Token;
use windlass_schema::BuildId;

use crate::eventually;
use crate::fake_service::{FakeService, Tables};

/// Lists of these IDs, on their way; what is named here is answered with its status.
fn sending(refused: &[(&str, u16)], ids: &[&str]) -> (FakeService, tokio::runtime::Runtime, SymbolUpload) {
    let service = FakeService::start(Tables::FromSkeletons);
    for (id, status) in refused {
        service.answer_artefacts(id, *status);
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = Service::new(&service.url(), Token::default(), Arc::new(Metrics::default())).unwrap();
    let upload = SymbolUpload::start(runtime.handle(), client);
    for id in ids {
        assert!(upload.send(id.parse::<BuildId>().unwrap(), format!("1000 10 {id}\n").into_bytes()));
    }
    (service, runtime, upload)
}

#[track_caller]
fn arrives(service: &FakeService, id: &str) {
    eventually(id, || service.artefact(&format!("{id} perfmap")).is_some());
}

/// How often the list of `id` was answered with `status`.
fn answers(service: &FakeService, id: &str, status: u16) -> usize {
    let line = format!("PUT {id} perfmap {status}");
    service.requests().iter().filter(|request| **request == line).count()
}

#[test]
fn one_that_the_service_fails_for_lets_others_pass() {
    let (service, _runtime, _upload) = sending(&[("aa01", 500)], &["aa01", "aa02", "aa03"]);
    arrives(&service, "aa02");
    arrives(&service, "aa03");
    eventually("it is tried again", || answers(&service, "aa01", 500) > 1);
    service.answer_artefacts("aa01", 201);
    arrives(&service, "aa01");
}

#[test]
fn a_token_that_is_refused_gets_mended() {
    for status in [401, 403] {
        let (service, _runtime, _upload) = sending(&[("aa01", status)], &["aa01"]);
        eventually("it is tried again", || answers(&service, "aa01", status) > 1);
        service.answer_artefacts("aa01", 201);
        arrives(&service, "aa01");
    }
}

#[test]
fn what_is_refused_for_what_it_is_goes() {
    let (service, runtime, upload) = sending(&[("aa01", 413)], &["aa01", "aa02"]);
    arrives(&service, "aa02");
    runtime.block_on(upload.finish());
    assert_eq!(answers(&service, "aa01", 413), 1);
}
