//! Cases of [`crate::catalog::Tokens`].

use super::{Open, blob};
use crate::token::{Scope, Token};

fn token(name: &str) -> Token {
    let scopes = vec![Scope::Admin, Scope::Upload("try".parse().unwrap()), Scope::Read];
    Token::new(name, scopes, 100, Some(200)).unwrap()
}

pub(crate) fn a_token_is_found_by_its_secret(open: Open<'_>) {
    let (here, there) = (open(), open());
    let (one, two) = (blob("one").hash, blob("two").hash);
    assert_eq!(here.tokens().unwrap(), []);
    assert!(here.put_token(one, &token("b")).unwrap());
    assert!(here.put_token(two, &Token { expires_s: None, ..token("a") }).unwrap());
    assert_eq!(there.token(one).unwrap(), Some(token("b")));
    assert_eq!(there.token(blob("three").hash).unwrap(), None);
    let names: Vec<_> = there.tokens().unwrap().into_iter().map(|token| token.name).collect();
    assert_eq!(names, ["a", "b"]);
}

pub(crate) fn a_revoked_token_stays_on_record_with_its_name(open: Open<'_>) {
    let (here, there) = (open(), open());
    let secret = blob("one").hash;
    assert!(here.put_token(secret, &token("ci")).unwrap());
    assert!(here.revoke_token("ci", 150).unwrap());
    assert!(here.revoke_token("ci", 170).unwrap());
    assert!(!here.revoke_token("other", 150).unwrap());
    assert_eq!(there.token(secret).unwrap().unwrap().revoked_s, Some(150), "the first time counts");
    assert!(!there.put_token(blob("two").hash, &token("ci")).unwrap(), "the log has one meaning of a name");
    assert_eq!(there.token(blob("two").hash).unwrap(), None);
    assert!(!there.put_token(secret, &token("ci-2")).unwrap(), "a secret has one name");
}

pub(crate) fn a_use_is_recorded_once_in_a_while(open: Open<'_>) {
    let catalog = open();
    let secret = blob("one").hash;
    catalog.put_token(secret, &token("ci")).unwrap();
    for (at_s, unless_since_s, expect) in [(1000, 900, 1000), (1050, 950, 1000), (1101, 1001, 1101)] {
        catalog.use_token(secret, at_s, unless_since_s).unwrap();
        assert_eq!(open().token(secret).unwrap().unwrap().last_used_s, Some(expect));
    }
}
