//! Names for the locations of a pprof profile.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use windlass_schema::BuildId;
use windlass_schema::http::{
    ImageAddresses, ImageFrames, MAX_SYMBOLIZE_ADDRESSES, SymbolizeRequest, SymbolizeResponse,
};
use windlass_schema::pprof::{Function, Line, Mapping, Profile};

use super::segments::{self, Segments};
use super::string_table::StringTable;
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

/// Fills in the lines of every location that has none and whose mapping has a build-ID. Addresses are
/// lowered into the call already, as OTLP and pprof demand; module `segments` tells whose they are.
pub(crate) async fn name_locations(
    app: &Arc<App>,
    profile: Profile,
    unnamed: Unnamed,
) -> Result<Profile, ServiceError> {
    let mut namer = Namer::new(profile, unnamed);
    let mut segments = HashMap::new();
    for build_id in namer.mapped_images() {
        if let Some(found) = segments::find(app, build_id).await? {
            segments.insert(build_id, found);
        }
    }
    let images = namer.images(&segments);
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
    /// The image addresses of those.
    addresses: HashMap<usize, u64>,
    /// Where the functions of locations without name start.
    starts: HashMap<usize, u64>,
    strings: StringTable,
    functions: HashMap<[i64; 3], u64>,
    next_function: u64,
}

impl Namer {
    fn new(mut profile: Profile, unnamed: Unnamed) -> Self {
        let strings = StringTable::new(std::mem::take(&mut profile.string_table));
        let functions =
            profile.function.iter().map(|f| ([f.name, f.system_name, f.filename], f.id)).collect();
        let next_function = profile.function.iter().map(|f| f.id).max().unwrap_or_default().saturating_add(1);
        Self {
            profile,
            unnamed,
            asked: BTreeMap::new(),
            addresses: HashMap::new(),
            starts: HashMap::new(),
            strings,
            functions,
            next_function,
        }
    }

    fn string(&mut self, text: &str) -> i64 {
        self.strings.intern(text)
    }

    /// Locations without a line in a mapping with a build-ID.
    fn nameless(&self) -> Vec<(usize, u64, Mapping, BuildId)> {
        let mappings: HashMap<u64, (Mapping, BuildId)> = (self.profile.mapping.iter())
            .filter_map(|mapping| {
                Some((mapping.id, (*mapping, self.strings.get(mapping.build_id).parse().ok()?)))
            })
            .collect();
        let nameless =
            self.profile.location.iter().enumerate().filter(|(_, location)| location.line.is_empty());
        nameless
            .filter_map(|(position, location)| {
                let (mapping, build_id) = mappings.get(&location.mapping_id)?;
                Some((position, location.address, *mapping, *build_id))
            })
            .collect()
    }

    /// The images whose segments are needed to tell addresses.
    fn mapped_images(&self) -> BTreeSet<BuildId> {
        let nameless = self.nameless().into_iter();
        nameless
            .filter(|(_, address, mapping, _)| {
                segments::is_mapped(mapping, self.strings.get(mapping.filename), *address)
            })
            .map(|(.., build_id)| build_id)
            .collect()
    }

    /// The addresses to ask for, by image; remembers which locations they belong to.
    fn images(&mut self, segments: &HashMap<BuildId, Segments>) -> Vec<(BuildId, Vec<u64>)> {
        for (position, address, mapping, build_id) in self.nameless() {
            let address = match segments.get(&build_id) {
                Some(segments)
                    if segments::is_mapped(&mapping, self.strings.get(mapping.filename), address) =>
                {
                    segments.image_address(&mapping, address)
                }
                _ => Some(address),
            };
            if let Some(address) = address {
                self.addresses.insert(position, address);
                self.asked.entry(build_id).or_default().push(position);
            }
        }
        let address = |position: &usize| self.addresses[position];
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
                    let known = self.starts.get(&position).or_else(|| self.addresses.get(&position));
                    let address = known.copied().unwrap_or(location.address);
                    let mapping = positions.get(&location.mapping_id).map(|at| &self.profile.mapping[*at]);
                    let name =
                        describe(mapping.map_or("", |mapping| self.strings.get(mapping.filename)), address);
                    let name = self.string(&name);
                    let function_id = self.function([name, name, 0]);
                    self.profile.location[position].line = vec![Line { function_id, line: 0, column: 0 }];
                }
            }
        }
        self.profile.string_table = self.strings.into_strings();
        self.profile
    }
}

/// `IMAGE+0xADDRESS`, or the bare address outside any image.
fn describe(file: &str, address: u64) -> String {
    match base_name(file).as_str() {
        "" => format!("{address:#x}"),
        file => format!("{file}+{address:#x}"),
    }
}
