// Package docs checks that README and docs/ tell only what is true of the
// code: commands and flags exist, variables are known, documents parse, links
// lead somewhere, systemd takes the units, and the configuration reference is the
// one that the structs make.
package docs
