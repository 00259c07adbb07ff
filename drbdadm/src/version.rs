//! Versions that scripts look at. Spec: config-and-drbdadm.md §14.9, §20.

use bstr::BString;

use crate::backend::escape;

/// Version of the tools whose behaviour this is.
pub const VERSION: &str = "9.22.0";

/// Says what this build is.
pub const BUILD_TAG: &str = concat!("GIT-hash: none drbdrs ", env!("CARGO_PKG_VERSION"));

/// Version of the driver that the tools speak to, as scripts want it: 8.4.11.
pub const KERNEL_VERSION_CODE: u32 = 0x08_040b;

/// Output of `-V`.
pub fn text() -> BString {
    let tag = escape(BUILD_TAG.into());
    format!(
        "DRBDADM_BUILDTAG={tag}\nDRBDADM_API_VERSION=1\nDRBD_KERNEL_VERSION_CODE=0x{:06x}\n\
         DRBDADM_VERSION_CODE=0x{:06x}\nDRBDADM_VERSION={VERSION}\n",
        KERNEL_VERSION_CODE, 0x09_1600
    )
    .into()
}
