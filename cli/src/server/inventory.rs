//! The routes that say what is stored, label and delete it.

use reqwest::Method;
use windlass_schema::BuildId;
use windlass_schema::http::{
    Deleted, ImageDetails, ImageList, LabelRequest, LabelResponse, MAX_LABELLED_IMAGES, NamespaceUsage,
};

use super::{Server, ServerError, percent_encoded};

/// Which images to list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing {
    /// Of this namespace only.
    pub(crate) namespace: Option<String>,
    /// With this label only.
    pub(crate) label: Option<String>,
    /// Behind this one.
    pub(crate) after: Option<BuildId>,
    /// At most of so many build-IDs.
    pub(crate) limit: usize,
}

/// What to delete of an image.
#[derive(Clone, Debug, Default)]
pub(crate) struct Deletion {
    /// Of this namespace; of the service's most trusted one by default.
    pub(crate) namespace: Option<String>,
    /// This kind only.
    pub(crate) kind: Option<String>,
    /// Under this path only.
    pub(crate) path: Option<String>,
}

fn query(parameters: &[(&str, Option<&str>)]) -> String {
    let stated = parameters.iter().filter_map(|(name, value)| Some((name, (*value)?)));
    stated.map(|(name, value)| format!("{name}={}", percent_encoded(value))).collect::<Vec<_>>().join("&")
}

impl Server {
    /// A page of images.
    pub(crate) async fn images(&self, listing: &Listing) -> Result<ImageList, ServerError> {
        let (after, limit) = (listing.after.map(|id| id.to_string()), listing.limit.to_string());
        let mut url = self.route(["api", "v1", "artefacts"]);
        url.set_query(Some(&query(&[
            ("namespace", listing.namespace.as_deref()),
            ("label", listing.label.as_deref()),
            ("after", after.as_deref()),
            ("limit", Some(&limit)),
        ])));
        let answer = self.send(self.request_to(Method::GET, url)).await?;
        self.json(answer).await
    }

    /// All that is stored of an image.
    pub(crate) async fn image(&self, id: BuildId) -> Result<ImageDetails, ServerError> {
        let id = id.to_string();
        let answer = self.send(self.request(Method::GET, ["api", "v1", "artefacts", &id])).await?;
        self.json(answer).await
    }

    /// Deletes artefacts of an image.
    pub(crate) async fn delete(&self, id: BuildId, deletion: &Deletion) -> Result<Deleted, ServerError> {
        let mut url = self.route(["api", "v1", "artefacts", &id.to_string()]);
        url.set_query(Some(&query(&[
            ("namespace", deletion.namespace.as_deref()),
            ("kind", deletion.kind.as_deref()),
            ("path", deletion.path.as_deref()),
        ])));
        let answer = self.send(self.request_to(Method::DELETE, url)).await?;
        self.json(answer).await
    }

    /// Gives labels to images, and takes them.
    pub(crate) async fn label(
        &self,
        ids: &[BuildId],
        add: &[String],
        remove: &[String],
    ) -> Result<LabelResponse, ServerError> {
        let mut whole = LabelResponse::default();
        for ids in ids.chunks(MAX_LABELLED_IMAGES) {
            let (add, remove) = (add.to_vec(), remove.to_vec());
            let request = LabelRequest { build_ids: ids.to_vec(), add, remove };
            let answer =
                self.send(self.request(Method::POST, ["api", "v1", "labels"]).json(&request)).await?;
            let part: LabelResponse = self.json(answer).await?;
            whole.changed += part.changed;
            whole.unchanged += part.unchanged;
            whole.unknown.extend(part.unknown);
            whole.too_many.extend(part.too_many);
        }
        Ok(whole)
    }

    /// What each namespace takes.
    pub(crate) async fn namespaces(&self) -> Result<Vec<NamespaceUsage>, ServerError> {
        let answer = self.send(self.request(Method::GET, ["api", "v1", "namespaces"])).await?;
        self.json(answer).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_has_what_is_stated() {
        assert_eq!(query(&[("a", None), ("b", Some("x=y&z")), ("c", Some("/ü"))]), "b=x%3Dy%26z&c=%2F%C3%BC");
        assert_eq!(query(&[("a", None)]), "");
    }
}
