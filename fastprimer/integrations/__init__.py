"""fastprimer's operations under the names and signatures of other libraries."""
