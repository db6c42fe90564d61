// Package doors is what the gateway and its certificate authority say to each
// other of certificates for other programs: web servers, appliances, whatever
// speaks ACME or EST. They come from an intermediate of their own, whose
// leaves open no channel, and carry host names and addresses only.
//
// The gateway decides who may have which name, keeps what was issued and
// revoked, and answers on its listeners. The authority holds the keys, builds
// certificates, and signs what is said of them (CRL, RFC 5280; OCSP, RFC 6960).
package doors
