package wire

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestOfflineFileRoundTrip(t *testing.T) {
	env := Envelope{Type: TypeOfflineRequest, Payload: []byte(`{"root":"x"}`), Chain: [][]byte{{1, 2}}, Signature: []byte{3}}
	b, err := AppendOffline([]byte("to whom it may concern\n"), PEMOfflineRequest, env)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseOffline(append(b, "\ngreetings\n"...), PEMOfflineRequest, MaxOfflineRequest)
	if err != nil || !reflect.DeepEqual(got, env) {
		t.Fatalf("%+v, %v; want %+v", got, err, env)
	}
	for name, text := range map[string]string{
		"nothing":      "",
		"another kind": strings.ReplaceAll(string(b), PEMOfflineRequest, PEMOfflineAnswer),
		"two":          string(b) + string(b),
		"cut off":      string(b[:len(b)/2]),
		"too long":     string(b) + strings.Repeat(" ", MaxOfflineRequest),
	} {
		if _, err := ParseOffline([]byte(text), PEMOfflineRequest, MaxOfflineRequest); !errors.Is(err, ErrOfflineFile) {
			t.Errorf("%s: %v, want ErrOfflineFile", name, err)
		}
	}
}

func FuzzParseOffline(f *testing.F) {
	b, err := AppendOffline(nil, PEMOfflineAnswer, Envelope{Type: TypeOfflineAnswer, Payload: []byte("{}")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("-----BEGIN " + PEMOfflineAnswer + "-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		env, err := ParseOffline(b, PEMOfflineAnswer, MaxOfflineAnswer)
		if err != nil {
			return
		}
		again, err := AppendOffline(nil, PEMOfflineAnswer, env)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ParseOffline(again, PEMOfflineAnswer, 2*MaxOfflineAnswer); err != nil || !reflect.DeepEqual(got, env) {
			t.Fatalf("%+v, %v; want %+v", got, err, env)
		}
	})
}
