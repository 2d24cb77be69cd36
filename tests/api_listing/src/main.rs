//! Prints the public API of crates: the arguments are their rustdoc JSON files. Blanket, auto trait and derived impls are left out.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    for (index, path) in std::env::args_os().skip(1).enumerate() {
        if index > 0 {
            println!();
        }
        let api = public_api::Builder::from_rustdoc_json(&path)
            .omit_blanket_impls(true)
            .omit_auto_trait_impls(true)
            .omit_auto_derived_impls(true)
            .build()
            .map_err(|error| format!("{}: {error}", path.display()))?;
        print!("{api}");
    }
    Ok(())
}
