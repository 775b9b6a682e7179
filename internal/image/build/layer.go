package build

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"hash"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// keptLayer is a compressed layer in a file, with its sums in a file beside it:
// to compress a kernel takes longer than everything else together, and to sum it
// up again most of the rest.
type keptLayer struct {
	file string
	sums layerSums
}

type layerSums struct {
	Compressed v1.Hash `json:"digest"`
	Plain      v1.Hash `json:"diff_id"`
	Length     int64   `json:"size"`
}

func sumsFile(file string) string { return file + ".json" }

// openLayer finds a layer that writeLayer has written.
func openLayer(file string) (keptLayer, error) {
	l := keptLayer{file: file}
	b, err := os.ReadFile(sumsFile(file))
	if err == nil {
		err = json.Unmarshal(b, &l.sums)
	}
	if err != nil {
		return l, err
	}
	info, err := os.Stat(file)
	if err == nil && info.Size() != l.sums.Length {
		err = io.ErrUnexpectedEOF
	}
	return l, err
}

// writeLayer writes a layer, and its sums last.
func writeLayer(file string, fill func(*archive)) error {
	compressed, plain := sha256.New(), sha256.New()
	length := counter(0)
	err := writeFile(file, func(w io.Writer) error { return compress(io.MultiWriter(w, compressed, &length), plain, fill) })
	if err != nil {
		return err
	}
	b, err := json.Marshal(layerSums{sha(compressed), sha(plain), int64(length)})
	if err != nil {
		return err
	}
	return writeFile(sumsFile(file), func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
}

func sha(h hash.Hash) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}
}

// counter counts what is written to it.
type counter int64

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

func (l keptLayer) Digest() (v1.Hash, error)            { return l.sums.Compressed, nil }
func (l keptLayer) DiffID() (v1.Hash, error)            { return l.sums.Plain, nil }
func (l keptLayer) Size() (int64, error)                { return l.sums.Length, nil }
func (l keptLayer) MediaType() (types.MediaType, error) { return types.OCILayer, nil }
func (l keptLayer) Compressed() (io.ReadCloser, error)  { return os.Open(l.file) }
func (l keptLayer) Uncompressed() (io.ReadCloser, error) {
	f, err := os.Open(l.file)
	if err != nil {
		return nil, err
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return unzipped{z, f}, nil
}

// unzipped closes both.
type unzipped struct {
	*gzip.Reader
	file *os.File
}

func (u unzipped) Close() error {
	u.Reader.Close()
	return u.file.Close()
}
