//! States in JSON: by the names of the status output.

/// `#[serde(with = ...)]` for one enum of `drbd_types`.
macro_rules! by_name {
    ($(#[$doc:meta])* $module:ident, $type:ident) => {
        $(#[$doc])*
        pub mod $module {
            use drbd_types::$type;
            use serde::{Deserialize, Deserializer, Serializer, de::Error};

            /// Writes the name.
            ///
            /// # Errors
            /// Those of the serializer.
            #[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
            pub fn serialize<S: Serializer>(state: &$type, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(state.name())
            }

            /// Reads the name.
            ///
            /// # Errors
            /// Not the name of a state.
            pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<$type, D::Error> {
                let name = std::borrow::Cow::<'d, str>::deserialize(from)?;
                let found = $type::ALL.iter().find(|s| s.name() == name);
                found.copied().ok_or_else(|| {
                    D::Error::custom(format!(concat!("'{}' is no ", stringify!($type)), name))
                })
            }
        }
    };
}

by_name! {
    /// Roles.
    role, Role
}
by_name! {
    /// Connection states.
    cstate, Cstate
}
by_name! {
    /// Disk states.
    dstate, Dstate
}
