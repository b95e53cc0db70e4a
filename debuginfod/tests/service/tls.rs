//! The service with a certificate of its own.

use std::path::Path;
use std::process::Command;

use reqwest::{Certificate, Client};

use crate::administered::{Program, administer, eventually};
use crate::server::{client, run};

/// Writes a certificate that nobody issued but its own holder, and its key. Returns it.
pub(crate) fn certify(folder: &Path) -> Vec<u8> {
    run(Command::new("openssl").current_dir(folder).args([
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=windlass test",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-keyout",
        "key.pem",
        "-out",
        "certificate.pem",
    ]));
    std::fs::read(folder.join("certificate.pem")).expect("written")
}

/// A client that trusts this certificate and no other.
pub(crate) fn trusting(pem: &[u8]) -> Client {
    let _ = client(); // installs the provider
    let certificate = Certificate::from_pem(pem).expect("a certificate");
    Client::builder().no_zstd().no_gzip().no_proxy().tls_certs_only([certificate]).build().expect("a client")
}

#[tokio::test(flavor = "multi_thread")]
async fn https_with_a_certificate_that_can_be_renewed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("text").to_owned();
    let (certificate, key) = (path("certificate.pem"), path("key.pem"));
    let options = ["--tls-cert", certificate.as_str(), "--tls-key", key.as_str()];
    let without = administer(folder.path(), &[&["serve"][..], &options].concat());
    assert!(String::from_utf8_lossy(&without.stderr).contains("certificate.pem"), "no such file");

    let first = certify(folder.path());
    let daemon = Program::serve(folder.path(), &options);
    assert!(daemon.url.starts_with("https://"), "{}", daemon.url);
    let health = format!("{}/healthz", daemon.url);
    let answer = trusting(&first).get(&health).send().await.expect("it is trusted");
    assert_eq!((answer.status().as_u16(), answer.text().await.expect("a body").as_str()), (200, "ok\n"));
    assert!(client().get(&health).send().await.is_err(), "nobody issued it");
    assert!(client().get(health.replace("https", "http")).send().await.is_err(), "TLS only");
    let hang_up = || run(Command::new("kill").args(["-HUP", &daemon.pid().to_string()]));

    std::fs::write(&key, "no key").expect("written");
    hang_up();
    trusting(&first).get(&health).send().await.expect("what cannot be used changes nothing");
    let second = certify(folder.path());
    hang_up();
    eventually("renewed", || async { trusting(&second).get(&health).send().await.is_ok() }).await;
    assert!(trusting(&first).get(&health).send().await.is_err(), "the old one is out of use");
}
