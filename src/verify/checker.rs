//! Whether what happened in a run was allowed.
