// Package pki is the certificate authority, on github.com/smallstep/certificates.
// It runs inside the gateway, which is only its registration authority: the
// gateway says who a party is, the authority decides what stands in a
// certificate.
//
// Its directory, $SALLYPORT_DATA/pki, is kept outside the database, so that a
// wiped or restored gateway stays in its trust domain:
//
//	root.pem, root.key                  the root; every join code pins its key
//	intermediate.pem, intermediate.key  the SPIFFE intermediate, which signs leaves, revocations and the list of roots
//	doors.pem, doors.key, doors.json    the intermediate for other programs, made when it is first wanted; then
//	                                    which ones there are (doors-2.pem, doors-cross-2.pem and so on)
//	trust-domain                        the name, made once from the root
//	revocations.json                    the highest signed revocation set
//	issuers.json, trust.json            after a rollover: which issuers there are (root-2.pem,
//	                                    intermediate-2.key and so on), and what parties are told
//	gateways/                           of a process of its own: who may ask it, and open codes
//	lock                                one process at a time
//
// Gateways in other processes reach it through [Server] and [Client]. Keys may
// be encrypted in their files, or kept by another process: [Signer]. With
// [WithExternal] there are none here: a step-ca elsewhere issues, and the
// directory holds documents.pem and documents.key, which seal revocation sets.
//
// [Doors] certifies other programs: host names and addresses, never a party. Its
// intermediate is barred from the trust domain and no channel trusts it.
//
// A leaf names one party, as a SPIFFE ID and as <uuid>.<role>.<trust-domain>.
// Name constraints keep the intermediate inside the trust domain. Only
// [Authority.IssueGateway] makes gateways; it is for the operator of the
// authority's own host and is not reachable over any network.
package pki
