package channel

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"

	"sallyport/internal/identity"
)

// tickets seals the state of sessions into what the peer brings when it comes
// back. In the state stand the peer's whole chains, of which all but the leaf are
// ours too: they are left out. A ticket of 1 KB instead of 2.7 is that much less
// in each ClientHello, and crypto/tls holds on to the buffers that it was read
// into for as long as the connection lives.
type tickets struct {
	id     *identity.Identity
	secret [32]byte
}

const (
	ticketSalt = 16 // each ticket has a key of its own: one key for all would run out of nonces
	sharedName = 8  // bytes of a certificate's hash
)

// aead is the cipher of one ticket.
func (t *tickets) aead(salt []byte) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, t.secret[:], salt, "sallyport tls ticket", 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// wrap is WrapSession of a tls.Config.
func (t *tickets) wrap(_ tls.ConnectionState, state *tls.SessionState) ([]byte, error) {
	plain, err := state.Bytes()
	if err != nil {
		return nil, err
	}
	plain = abridge(plain, t.shared())
	out := make([]byte, ticketSalt, ticketSalt+len(plain)+16)
	if _, err := rand.Read(out); err != nil {
		return nil, err
	}
	aead, err := t.aead(out)
	if err != nil {
		return nil, err
	}
	return aead.Seal(out, make([]byte, aead.NonceSize()), plain, nil), nil
}

// unwrap is UnwrapSession of a tls.Config. A ticket that is not ours, or names
// a certificate that we have given up, costs a full handshake.
func (t *tickets) unwrap(ticket []byte, _ tls.ConnectionState) (*tls.SessionState, error) {
	if len(ticket) < ticketSalt {
		return nil, nil
	}
	aead, err := t.aead(ticket[:ticketSalt])
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, make([]byte, aead.NonceSize()), ticket[ticketSalt:], nil)
	if err != nil {
		return nil, nil //nolint:nilerror // somebody else's, or before our key changed
	}
	full, ok := complete(plain, t.shared())
	if !ok {
		return nil, nil
	}
	state, err := tls.ParseSessionState(full)
	if err != nil {
		return nil, nil //nolint:nilerror // of another version of crypto/tls
	}
	return state, nil
}

// shared is what our chain and our peers' have in common.
func (t *tickets) shared() [][]byte {
	if chain := t.id.Chain(); len(chain) > 1 {
		return chain[1:]
	}
	return nil
}

func nameOfShared(der []byte) []byte {
	sum := sha256.Sum256(der)
	return sum[:sharedName]
}

// abridge writes the name of what is shared in its place: pieces of text, each
// behind its length, with a name between each two.
func abridge(text []byte, shared [][]byte) []byte {
	var out []byte
	for {
		at, der := len(text), []byte(nil)
		for _, s := range shared {
			if i := bytes.Index(text, s); i >= 0 && i < at && len(s) > 0 {
				at, der = i, s
			}
		}
		out = append(binary.AppendUvarint(out, uint64(at)), text[:at]...)
		if der == nil {
			return out
		}
		out = append(out, nameOfShared(der)...)
		text = text[at+len(der):]
	}
}

// complete undoes abridge. The result is as large as it needs to be: what is
// parsed of it keeps it alive.
func complete(in []byte, shared [][]byte) (text []byte, ok bool) {
	named := make(map[string][]byte, len(shared))
	for _, s := range shared {
		named[string(nameOfShared(s))] = s
	}
	var pieces [][]byte
	for {
		n, k := binary.Uvarint(in)
		if k <= 0 || n > uint64(len(in)-k) {
			return nil, false
		}
		pieces = append(pieces, in[k:k+int(n)])
		if in = in[k+int(n):]; len(in) == 0 {
			return bytes.Join(pieces, nil), true
		}
		if len(in) < sharedName {
			return nil, false
		}
		der, there := named[string(in[:sharedName])]
		if !there {
			return nil, false
		}
		pieces, in = append(pieces, der), in[sharedName:]
	}
}
