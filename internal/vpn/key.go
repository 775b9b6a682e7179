package vpn

import (
	"fmt"
	"log/slog"

	"github.com/containerd/errdefs"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Key is a public key: it says who a peer is.
type Key [wgtypes.KeyLen]byte

// ParseKey reads a key as `wg pubkey` prints it.
func ParseKey(text string) (Key, error) {
	k, err := parseKey(text)
	if err != nil {
		return Key{}, fmt.Errorf("%q is not a public key of WireGuard's, which has 44 characters and ends with =: %w", text, errdefs.ErrInvalidArgument)
	}
	return k, nil
}

func parseKey(text string) (Key, error) {
	k, err := wgtypes.ParseKey(text)
	// Base64 has more than one text for the same bytes.
	if err == nil && (k.String() != text || k == wgtypes.Key{}) {
		err = errdefs.ErrInvalidArgument
	}
	return Key(k), err
}

func (k Key) String() string { return wgtypes.Key(k).String() }

// MarshalText writes the key in base64.
func (k Key) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (k *Key) UnmarshalText(text []byte) (err error) {
	*k, err = ParseKey(string(text))
	return err
}

// PrivateKey proves who one is. It is not for logs.
type PrivateKey struct{ key wgtypes.Key }

// NewPrivateKey makes a key that nobody has.
func NewPrivateKey() (PrivateKey, error) {
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return PrivateKey{}, fmt.Errorf("make a key: %w", err)
	}
	return PrivateKey{k}, nil
}

// parsePrivateKey reads a key as `wg genkey` prints it. The error does not show it.
func parsePrivateKey(text string) (PrivateKey, error) {
	k, err := parseKey(text)
	if err != nil {
		return PrivateKey{}, fmt.Errorf("it is no private key of WireGuard's: %w", errdefs.ErrInvalidArgument)
	}
	return PrivateKey{wgtypes.Key(k)}, nil
}

// Public is the key that peers know.
func (k PrivateKey) Public() Key { return Key(k.key.PublicKey()) }

// Text is the key itself, in base64.
func (k PrivateKey) Text() string { return k.key.String() }

// LogValue keeps the key out of logs.
func (PrivateKey) LogValue() slog.Value { return slog.StringValue("***") }

func (PrivateKey) String() string { return "***" }

// GoString keeps the key out of what %#v prints.
func (PrivateKey) GoString() string { return "***" }
