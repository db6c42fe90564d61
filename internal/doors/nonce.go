package doors

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// MaxNonce and minNonce bound the nonce of an OCSP request, in bytes (RFC 9654,
// 2.1; RFC 8954 allowed 1 to 32, which clients still send).
const (
	MaxNonce = 128
	minNonce = 1
)

var oidNonce = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 2}

// ErrNonce says that the extensions of an OCSP request are malformed, or that
// its nonce has a length that none has.
var ErrNonce = errors.New("malformed OCSP request")

// NonceOf returns the nonce of an OCSP request (DER; RFC 6960, 4.1.1), nil if it
// has none.
func NonceOf(request []byte) ([]byte, error) {
	in := cryptobyte.String(request)
	var outer, tbs, skipped, wrapped, list cryptobyte.String
	var hasVersion, hasName, hasExtensions bool
	if !in.ReadASN1(&outer, cbasn1.SEQUENCE) || !outer.ReadASN1(&tbs, cbasn1.SEQUENCE) ||
		!tbs.ReadOptionalASN1(&skipped, &hasVersion, cbasn1.Tag(0).Constructed().ContextSpecific()) ||
		!tbs.ReadOptionalASN1(&skipped, &hasName, cbasn1.Tag(1).Constructed().ContextSpecific()) ||
		!tbs.ReadASN1(&skipped, cbasn1.SEQUENCE) ||
		!tbs.ReadOptionalASN1(&wrapped, &hasExtensions, cbasn1.Tag(2).Constructed().ContextSpecific()) || !tbs.Empty() {
		return nil, ErrNonce
	}
	if !hasExtensions {
		return nil, nil
	}
	if !wrapped.ReadASN1(&list, cbasn1.SEQUENCE) || !wrapped.Empty() {
		return nil, ErrNonce
	}
	for !list.Empty() {
		var ext, value cryptobyte.String
		var id asn1.ObjectIdentifier
		if !list.ReadASN1(&ext, cbasn1.SEQUENCE) || !ext.ReadASN1ObjectIdentifier(&id) || !ext.SkipOptionalASN1(cbasn1.BOOLEAN) ||
			!ext.ReadASN1(&value, cbasn1.OCTET_STRING) || !ext.Empty() {
			return nil, ErrNonce
		}
		if !id.Equal(oidNonce) {
			continue
		}
		var nonce cryptobyte.String
		if !value.ReadASN1(&nonce, cbasn1.OCTET_STRING) || !value.Empty() || len(nonce) < minNonce || len(nonce) > MaxNonce {
			return nil, ErrNonce
		}
		return nonce, nil
	}
	return nil, nil
}

// NonceExtension is the extension of a response that repeats a nonce.
func NonceExtension(nonce []byte) (pkix.Extension, error) {
	value, err := asn1.Marshal(nonce)
	return pkix.Extension{Id: oidNonce, Value: value}, err
}
