use std::path::Path;
use windlass_schema::ImageAddress;
use windlass_symbol_index::*;
use crate::{addr2line, program::function_addresses};
#[test]
fn probe() {
    for path in std::env::var("PROBE").unwrap().split(':') {
    let elf = std::fs::read(path).unwrap();
    let t = std::time::Instant::now();
    let bytes = build(Input { debug: Some(&elf), ..Input::default() }).unwrap();
    let build_time = t.elapsed();
    let t = std::time::Instant::now();
    let index = Index::parse(&bytes).unwrap();
    let parse_time = t.elapsed();
    let addresses: Vec<u64> = function_addresses(&elf, 2).into_iter().step_by(7).take(20000).collect();
    let t = std::time::Instant::now();
    for a in &addresses { let _ = index.lookup(ImageAddress::new(*a)); }
    println!("{path} {} MB -> {} KB build {build_time:?} parse {parse_time:?} {} lookups {:?}", elf.len()>>20, bytes.len()>>10, addresses.len(), t.elapsed());
    let addresses: Vec<u64> = addresses.into_iter().step_by(4).collect();
    let oracle = addr2line::frames(Path::new(path), &addresses);
    let (mut len, mut place, mut outer, mut gf, mut of) = (0,0,0,0,0);
    for (a, o) in addresses.iter().zip(&oracle) {
        let got = index.lookup(ImageAddress::new(*a)).unwrap_or_default();
        gf += got.len(); of += o.len();
        len += usize::from(got.len() == o.len());
        let p = got.len()==o.len() && got.iter().zip(o).all(|(g,o)| g.line.unwrap_or(0)==o.line);
        place += usize::from(p);
        let oo = got.last().map(|f| f.function.to_string()).unwrap_or_default() == o.last().unwrap().function;
        outer += usize::from(oo);
        if !p && place % 50 == 0 { println!("{a:#x}\n {:?}\n {o:?}", got.iter().map(|f| (f.function.chars().take(60).collect::<String>(), f.line, f.provenance)).collect::<Vec<_>>()); }
    }
    println!("addresses {} same length {len} same lines {place} same outer name {outer} frames {gf} of {of}", addresses.len());
    }
}
