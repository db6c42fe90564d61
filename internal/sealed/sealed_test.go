package sealed

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"
)

const pass = "correct horse battery staple"

// seal is quick: the cost of a guess is not what these tests are about.
func seal(t testing.TB, text []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := NewWriter(&out, []byte(pass), MinCost)
	if err != nil {
		t.Fatal(err)
	}
	for len(text) > 0 { // in odd pieces
		n := min(7001, len(text))
		if _, err := w.Write(text[:n]); err != nil {
			t.Fatal(err)
		}
		text = text[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); err == nil {
		t.Fatal("written after the last chunk")
	}
	return out.Bytes()
}

func unseal(b []byte, pass string) ([]byte, error) {
	r, err := NewReader(iotest.OneByteReader(bytes.NewReader(b)), []byte(pass))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func text(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 31 / 7)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, 2 * chunkSize, 3*chunkSize + 5} {
		b := seal(t, text(n))
		got, err := unseal(b, pass)
		if err != nil || !bytes.Equal(got, text(n)) {
			t.Errorf("%d bytes: got %d, %v", n, len(got), err)
		}
		if n > 100 && bytes.Contains(b, text(n)[:64]) {
			t.Errorf("%d bytes: the text stands in the sealed file", n)
		}
	}
	if bytes.Equal(seal(t, text(10)), seal(t, text(10))) {
		t.Error("two seals of one text are equal")
	}
}

func TestTheDefaultCostIsRead(t *testing.T) {
	var out bytes.Buffer
	w, err := NewWriter(&out, []byte(pass), Cost)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(func() error { _, err := w.Write([]byte("x")); return err }(), w.Close()); err != nil {
		t.Fatal(err)
	}
	if got, err := unseal(out.Bytes(), pass); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestWrongPassphrase(t *testing.T) {
	if got, err := unseal(seal(t, text(100)), pass+" "); !errors.Is(err, ErrOpen) || len(got) > 0 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestEveryChangeIsSeen(t *testing.T) {
	original := text(2*chunkSize + 100)
	b := seal(t, original)
	sealedChunk := chunkSize + tagSize
	refuse := func(name string, changed []byte) {
		t.Helper()
		got, err := unseal(changed, pass)
		if err == nil {
			t.Errorf("%s: not seen", name)
		}
		if !bytes.HasPrefix(original, got) {
			t.Errorf("%s: %d bytes were returned that nobody wrote", name, len(got))
		}
	}
	for _, at := range []int{0, len(Magic), len(Magic) + 1, headerSize, headerSize + sealedChunk + 3, len(b) - 1} {
		changed := bytes.Clone(b)
		changed[at] ^= 1
		refuse("a bit", changed)
	}
	for _, n := range []int{0, 5, headerSize, headerSize + 1, headerSize + sealedChunk, headerSize + 2*sealedChunk, len(b) - 1} {
		refuse("cut off", b[:n])
	}
	refuse("longer", append(bytes.Clone(b), 0))
	one, two := b[headerSize:headerSize+sealedChunk], b[headerSize+sealedChunk:headerSize+2*sealedChunk]
	refuse("moved", bytes.Join([][]byte{b[:headerSize], two, one, b[headerSize+2*sealedChunk:]}, nil))
	refuse("left out", bytes.Join([][]byte{b[:headerSize], one, b[headerSize+2*sealedChunk:]}, nil))
	refuse("twice", bytes.Join([][]byte{b[:headerSize], one, one, two, b[headerSize+2*sealedChunk:]}, nil))
	other := seal(t, original)
	refuse("of another file", bytes.Join([][]byte{b[:headerSize], other[headerSize:]}, nil))
}

func TestHostileHeader(t *testing.T) {
	for name, h := range map[string][]byte{
		"empty": nil, "short": []byte(Magic), "other": bytes.Repeat([]byte("x"), 200),
		"dear": append(append([]byte(Magic), maxCost+1), make([]byte, 100)...),
		"free": append(append([]byte(Magic), 0), make([]byte, 100)...),
	} {
		if _, err := NewReader(bytes.NewReader(h), []byte(pass)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken := errors.New("broken")
	if _, err := NewReader(iotest.ErrReader(broken), []byte(pass)); !errors.Is(err, broken) {
		t.Errorf("an error of the disk: %v", err)
	}
}

func FuzzReader(f *testing.F) {
	f.Add(seal(f, text(10)))
	f.Add(seal(f, text(chunkSize+1)))
	f.Add([]byte(Magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > len(Magic) && b[len(Magic)] > MinCost {
			b[len(Magic)] = MinCost // the cost is the fuzzer's time
		}
		r, err := NewReader(bytes.NewReader(b), []byte(pass))
		if err != nil {
			return
		}
		if n, err := io.Copy(io.Discard, r); err == nil && n > int64(len(b)) {
			t.Errorf("%d bytes out of %d", n, len(b))
		}
	})
}
