//! Names for the locations of a pprof profile.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use windlass_schema::BuildId;
use windlass_schema::http::{
    ImageAddresses, ImageFrames, MAX_SYMBOLIZE_ADDRESSES, SymbolizeRequest, SymbolizeResponse,
};
use windlass_schema::pprof::{Function, Line, Profile};

use crate::error::ServiceError;
use crate::service::App;
use crate::symbolize::resolve;
use crate::upload::base_name;

/// What becomes of a location without a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unnamed {
    /// It stays as it is, so that someone with better debuginfo can name it later.
    Leave,
    /// It gets a function `IMAGE+0xADDRESS`, so that every viewer shows where it is. The address is where the
    /// function starts, if that is known: then all of it is one function in every viewer.
    Describe,
}

/// Fills in the lines of every location that has none and whose mapping has a build-ID. Addresses are image
/// addresses, lowered into the call already, as OTLP and pprof demand.
pub(crate) async fn name_locations(
    app: &Arc<App>,
    profile: Profile,
    unnamed: Unnamed,
) -> Result<Profile, ServiceError> {
    let mut namer = Namer::new(profile, unnamed);
    let images = namer.images();
    let mut batch = SymbolizeRequest::default();
    let mut size = 0;
    for (build_id, addresses) in images {
        for part in addresses.chunks(MAX_SYMBOLIZE_ADDRESSES) {
            if size + part.len() > MAX_SYMBOLIZE_ADDRESSES {
                let response = resolve(app, std::mem::take(&mut batch)).await?;
                namer.learn(response);
                size = 0;
            }
            size += part.len();
            batch.images.push(ImageAddresses { build_id, addresses: part.to_vec(), return_addresses: false });
        }
    }
    let response = resolve(app, batch).await?;
    Ok(tokio::task::spawn_blocking(move || {
        namer.learn(response);
        namer.finish()
    })
    .await?)
}

struct Namer {
    profile: Profile,
    unnamed: Unnamed,
    /// Positions of the locations to name, in the order in which they are asked for.
    asked: BTreeMap<BuildId, Vec<usize>>,
    /// Where the functions of locations without name start.
    starts: HashMap<usize, u64>,
    strings: HashMap<String, i64>,
    functions: HashMap<[i64; 3], u64>,
    next_function: u64,
}

impl Namer {
    fn new(profile: Profile, unnamed: Unnamed) -> Self {
        let mut strings = HashMap::new();
        for (index, text) in profile.string_table.iter().enumerate() {
            strings.entry(text.clone()).or_insert(index as i64);
        }
        let functions =
            profile.function.iter().map(|f| ([f.name, f.system_name, f.filename], f.id)).collect();
        let next_function = profile.function.iter().map(|f| f.id).max().unwrap_or_default().saturating_add(1);
        let mut namer = Self {
            profile,
            unnamed,
            asked: BTreeMap::new(),
            starts: HashMap::new(),
            strings,
            functions,
            next_function,
        };
        namer.string("");
        namer
    }

    fn string(&mut self, text: &str) -> i64 {
        if let Some(index) = self.strings.get(text) {
            return *index;
        }
        let index = self.profile.string_table.len() as i64;
        self.profile.string_table.push(text.to_owned());
        self.strings.insert(text.to_owned(), index);
        index
    }

    /// The addresses to ask for, by image; remembers which locations they belong to.
    fn images(&mut self) -> Vec<(BuildId, Vec<u64>)> {
        let build_ids: HashMap<u64, BuildId> = self
            .profile
            .mapping
            .iter()
            .filter_map(|mapping| Some((mapping.id, self.profile.string(mapping.build_id).parse().ok()?)))
            .collect();
        for (position, location) in self.profile.location.iter().enumerate() {
            if location.line.is_empty()
                && let Some(build_id) = build_ids.get(&location.mapping_id)
            {
                self.asked.entry(*build_id).or_default().push(position);
            }
        }
        let address = |position: &usize| self.profile.location[*position].address;
        self.asked.iter().map(|(id, positions)| (*id, positions.iter().map(address).collect())).collect()
    }

    /// Takes the names of an answer over. Answers come in the order of [`Namer::images`].
    fn learn(&mut self, response: SymbolizeResponse) {
        let names: Vec<(i64, i64)> = response
            .functions
            .iter()
            .map(|function| {
                let name = self.string(&function.name);
                (name, function.linkage_name.as_ref().map_or(name, |linkage| self.string(linkage)))
            })
            .collect();
        let files: Vec<i64> = response.files.iter().map(|file| self.string(file)).collect();
        for ImageFrames { build_id, addresses, unnamed_functions, .. } in response.images {
            let mut positions = self.asked.remove(&build_id).unwrap_or_default();
            let later = positions.split_off(positions.len().min(addresses.len()));
            let starts = unnamed_functions.into_iter();
            self.starts.extend(starts.filter_map(|(at, start)| Some((*positions.get(at as usize)?, start))));
            for (position, frames) in positions.into_iter().zip(addresses) {
                let mut lines = Vec::with_capacity(frames.len());
                for frame in frames {
                    let frame = response.frames[frame as usize];
                    let (name, system_name) = names[frame.function as usize];
                    let filename = frame.file.map_or(0, |file| files[file as usize]);
                    let function_id = self.function([name, system_name, filename]);
                    lines.push(Line { function_id, line: frame.line.map_or(0, i64::from), column: 0 });
                }
                self.profile.location[position].line = lines;
            }
            if !later.is_empty() {
                self.asked.insert(build_id, later);
            }
        }
    }

    fn function(&mut self, key: [i64; 3]) -> u64 {
        if let Some(id) = self.functions.get(&key) {
            return *id;
        }
        let id = self.next_function;
        self.next_function += 1;
        let [name, system_name, filename] = key;
        self.profile.function.push(Function { id, name, system_name, filename, start_line: 0 });
        self.functions.insert(key, id);
        id
    }

    /// States in each mapping what its locations have, and describes those without names.
    fn finish(mut self) -> Profile {
        let functions: HashMap<u64, i64> = self.profile.function.iter().map(|f| (f.id, f.filename)).collect();
        let positions: HashMap<u64, usize> =
            self.profile.mapping.iter().enumerate().map(|(at, mapping)| (mapping.id, at)).collect();
        for location in &self.profile.location {
            if let Some(at) = positions.get(&location.mapping_id)
                && let Some(first) = location.line.first()
            {
                let mapping = &mut self.profile.mapping[*at];
                mapping.has_functions = true;
                mapping.has_filenames |= functions.get(&first.function_id).is_some_and(|file| *file != 0);
                mapping.has_line_numbers |= first.line != 0;
                mapping.has_inline_frames |= location.line.len() > 1;
            }
        }
        if self.unnamed == Unnamed::Describe {
            for position in 0..self.profile.location.len() {
                let location = &self.profile.location[position];
                if location.line.is_empty() {
                    let address = self.starts.get(&position).copied().unwrap_or(location.address);
                    let name = describe(&self.profile, &positions, location.mapping_id, address);
                    let name = self.string(&name);
                    let function_id = self.function([name, name, 0]);
                    self.profile.location[position].line = vec![Line { function_id, line: 0, column: 0 }];
                }
            }
        }
        self.profile
    }
}

/// `IMAGE+0xADDRESS`, or the bare address outside any image.
fn describe(profile: &Profile, mappings: &HashMap<u64, usize>, mapping_id: u64, address: u64) -> String {
    let file = mappings.get(&mapping_id).map(|at| base_name(profile.string(profile.mapping[*at].filename)));
    match file.as_deref() {
        None | Some("") => format!("{address:#x}"),
        Some(file) => format!("{file}+{address:#x}"),
    }
}
