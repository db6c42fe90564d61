// Package identity holds what makes a party itself: its UUID, its private key,
// its certificate chain, the roots that it trusts and the keys that it no
// longer trusts. It verifies peers, signs and checks documents, and swaps
// certificates while channels run.
//
// One directory holds one identity in one trust domain:
//
//	id                the UUID, made once, kept across names and keys
//	key.pem           the private key (PKCS #8, ECDSA P-256, mode 0600)
//	key-next.pem      a key whose certificate has not arrived yet
//	chain.pem         leaf, SPIFFE intermediate, root
//	root.pem          every root that is trusted
//	pin.json          the root that a join code pinned
//	revocations.json  the highest signed revocation set seen
//
// Every file is replaced atomically and is on disk before a method returns.
package identity
