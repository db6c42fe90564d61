// Package pki is the certificate authority, on github.com/smallstep/certificates.
// It runs inside the gateway, which is only its registration authority: the
// gateway says who a party is, the authority decides what stands in a
// certificate.
//
// Its directory, $SALLYPORT_DATA/pki, is kept outside the database, so that a
// wiped or restored gateway stays in its trust domain:
//
//	root.pem, root.key                  the root; every join code pins its key
//	intermediate.pem, intermediate.key  the SPIFFE intermediate, which signs leaves and revocations
//	trust-domain                        the name, made once from the root
//	revocations.json                    the highest signed revocation set
//	lock                                one process at a time
//
// A leaf names one party, as a SPIFFE ID and as <uuid>.<role>.<trust-domain>.
// Name constraints keep the intermediate inside the trust domain. Only
// [Authority.IssueGateway] makes gateways; it is for the operator of the
// authority's own host and is not reachable over any network.
package pki
