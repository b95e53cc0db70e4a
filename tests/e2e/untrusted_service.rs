//! A service whose certificate the agent does not trust: it says so, keeps its profiles, and delivers them when it does.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use windlass_tests::service::TestService;
use windlass_tests::skip::{may_use_bpf, skip};

use super::agent_process::{AgentProcess, total};

/// A certificate that nobody issued but its own holder, for 127.0.0.1: as PEM in a file, and as a server takes it.
fn certificate(folder: &Path) -> Option<(PathBuf, rustls::ServerConfig)> {
    let (pem, key) = (folder.join("certificate.pem"), folder.join("key.pem"));
    let openssl = |arguments: &[&str]| {
        let output = Command::new("openssl").args(arguments).current_dir(folder).output().ok()?;
        output.status.success().then_some(output.stdout)
    };
    openssl(&[
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
        key.to_str()?,
        "-out",
        pem.to_str()?,
    ])?;
    let certificate = openssl(&["x509", "-in", pem.to_str()?, "-outform", "DER"])?;
    let key = openssl(&["pkcs8", "-topk8", "-nocrypt", "-in", key.to_str()?, "-outform", "DER"])?;
    let config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(
        vec![CertificateDer::from(certificate)],
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)),
    );
    Some((pem, config.expect("a certificate and its key")))
}

/// Answers TLS for the service at `behind`.
async fn serve(config: rustls::ServerConfig, behind: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("it has one");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // Who does not trust it hangs up.
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut service = TcpStream::connect(behind).await.expect("the service listens");
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut service).await;
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_trusted_is_named_and_nothing_is_lost() {
    const TEST: &str = "untrusted_service::a_certificate_that_is_not_trusted_is_named_and_nothing_is_lost";
    if !may_use_bpf(TEST) {
        return;
    }
    let service = TestService::start().await;
    let Some((pem, config)) = certificate(service.folder()) else { return skip(TEST, "there is no openssl") };
    let behind = service.url().trim_start_matches("http://").parse().expect("an address");
    let url = format!("https://{}", serve(config, behind).await);
    let cache_dir = service.folder().join("cache");

    let mut agent = AgentProcess::start(&mut AgentProcess::command(&url, &cache_dir));
    agent
        .eventually("it says what is wrong and what to do", async |agent| {
            let log = agent.log();
            log.contains("profiles are kept on disk") && log.contains("SSL_CERT_FILE") && log.contains(&url)
        })
        .await;
    let samples = |metrics: &str| total(metrics, "windlass_agent_samples_total");
    let spooled = |metrics: &str| total(metrics, "windlass_agent_spooled_batches ");
    let before = agent.metrics().await;
    agent
        .eventually("sampling goes on and the spool keeps", async |agent| {
            let now = agent.metrics().await;
            samples(&now) > samples(&before) && spooled(&now) > 1
        })
        .await;
    let metrics = agent.metrics().await;
    assert_eq!(total(&metrics, "windlass_agent_batches_sent_total"), 0, "nothing goes to who is not trusted");
    assert_eq!(total(&metrics, "windlass_agent_batches_dropped_total"), 0);
    let kept = spooled(&metrics);
    drop(agent);

    // What the advice says.
    let mut command = AgentProcess::command(&url, &cache_dir);
    let mut agent = AgentProcess::start(command.env("SSL_CERT_FILE", &pem));
    agent
        .eventually("all arrives", async |agent| {
            let metrics = agent.metrics().await;
            total(&metrics, "windlass_agent_batches_sent_total") > kept && spooled(&metrics) == 0
        })
        .await;
    drop(agent);
    service.stop().await;
}
