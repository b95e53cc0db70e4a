//! Names of code that compilers made at run time.

use reqwest::StatusCode;
use windlass_schema::http::{ImageAddresses, Provenance, Unresolved};
use windlass_schema::perf_map::perf_map_id;

use crate::naming::{names, symbolize};
use crate::server::Server;

#[tokio::test(flavor = "multi_thread")]
async fn code_of_a_compiler_has_the_names_of_its_list_and_of_no_other() {
    let server = Server::start().await;
    let list = b"7f3a00001000 40 JS:*fib /srv/app.js:3:12\n7f3a00001040 1c void Foo.bar(int)\n";
    let id = perf_map_id(list);
    let other = b"7f3a00001000 40 somebody else's\n";
    server.expect_put(&format!("{id}/perfmap"), other, StatusCode::UNPROCESSABLE_ENTITY).await;
    server.expect_put(&format!("{id}/perfmap"), list, StatusCode::CREATED).await;
    server.expect_put(&format!("{id}/perfmap"), list, StatusCode::OK).await;
    let addresses = vec![0x7f3a_0000_103f, 0x7f3a_0000_1040, 0x7f3a_0000_105c];
    let images = vec![ImageAddresses { build_id: id, addresses, return_addresses: false }];
    let named = symbolize(&server, images).await;
    assert_eq!(names(&named, 0, 0), [("JS:*fib /srv/app.js:3:12", Provenance::PerfMap)]);
    assert_eq!(names(&named, 0, 1), [("void Foo.bar(int)", Provenance::PerfMap)]);
    assert_eq!(named.images[0].unresolved, [(2, Unresolved::NoSymbolAtAddress)]);
}
