package pki

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"

	"sallyport/internal/doors"
)

// The parts of an OCSP response (RFC 6960, 4.2.1) that withNonce goes through.
type (
	ocspResponse struct {
		Status   asn1.Enumerated
		Response ocspBytes `asn1:"explicit,tag:0,optional"`
	}
	ocspBytes struct {
		Type     asn1.ObjectIdentifier
		Response []byte
	}
	ocspBasic struct {
		Data         asn1.RawValue
		Algorithm    pkix.AlgorithmIdentifier
		Signature    asn1.BitString
		Certificates []asn1.RawValue `asn1:"explicit,tag:0,optional"`
	}
)

var oidECDSAWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}

var errOCSP = errors.New("the OCSP response that was made is not as expected")

// withNonce puts the nonce of a request into a response that was signed without
// it, as x/crypto makes them, and signs it again: its place is the extensions of
// the response (RFC 9654, 2.1), not those of the one certificate.
func withNonce(der, nonce []byte, key crypto.Signer) ([]byte, error) {
	var outer ocspResponse
	if rest, err := asn1.Unmarshal(der, &outer); err != nil || len(rest) > 0 {
		return nil, errors.Join(errOCSP, err)
	}
	var basic ocspBasic
	if rest, err := asn1.Unmarshal(outer.Response.Response, &basic); err != nil || len(rest) > 0 || !basic.Algorithm.Algorithm.Equal(oidECDSAWithSHA256) {
		return nil, errors.Join(errOCSP, err)
	}
	ext, err := doors.NonceExtension(nonce)
	if err != nil {
		return nil, err
	}
	list, err := asn1.Marshal([]pkix.Extension{ext})
	if err != nil {
		return nil, err
	}
	const responseExtensions = 1 // explicit, the last of ResponseData
	tagged, err := asn1.Marshal(asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: responseExtensions, IsCompound: true, Bytes: list})
	if err != nil {
		return nil, err
	}
	data := asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagSequence, IsCompound: true, Bytes: append(basic.Data.Bytes[:len(basic.Data.Bytes):len(basic.Data.Bytes)], tagged...)}
	if data.FullBytes, err = asn1.Marshal(data); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(data.FullBytes)
	signature, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	basic.Data, basic.Signature = data, asn1.BitString{Bytes: signature, BitLength: 8 * len(signature)}
	if outer.Response.Response, err = asn1.Marshal(basic); err != nil {
		return nil, err
	}
	return asn1.Marshal(outer)
}
